"""The operating system's files, and whatever else the package asks of it.

Law: `os`, `fcntl` and the clock are used in this folder and nowhere else in the package.  What is
asked for is said in `_files`; nothing here knows what a frame is.
"""
