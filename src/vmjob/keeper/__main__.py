"""``python -m vmjob.keeper HOME NAME new|again FD``: what `vmjob.keeper.client.spawn` starts."""

import sys

from vmjob.keeper.server import serve

if __name__ == "__main__":
    sys.exit(serve(*sys.argv[1:]))
