import logging

# It tells of each folder for its fonts that it cannot write, and draws all the same.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
