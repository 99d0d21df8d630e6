"""``python -m vmjob`` is the command ``vmjob``."""

from vmjob.cli.main import main

if __name__ == "__main__":
    main()
