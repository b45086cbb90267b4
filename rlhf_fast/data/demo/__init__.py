"""Data and gold scorer of the demo run; `make.py` says how the files were made."""
