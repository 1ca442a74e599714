"""What the scripts share: prices in, text out, a fine-tuned forecaster, honest scores.

Importing this package loads nothing heavy; import the submodule you need.
"""

__version__ = "0.1.0"
