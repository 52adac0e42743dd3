"""Floor 8: the command line. Thin: parse, load, call one library function, print.

To add a command, write its file and give it a row in `main.py`. Options say where and how to run,
never what is computed; that is YAML (and `--set`). Results go to stdout, progress to stderr. No
command file imports anything heavy at its top level.
"""
