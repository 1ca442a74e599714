"""``python -m stocklora.instruct.lint FILE``: the command; the checks are in ``stocklora.instruct.rows.lint``."""

import sys

from stocklora.instruct.rows.lint import main

if __name__ == "__main__":
    sys.exit(main())
