"""`megashear plan` as a script of the checkout."""

import sys

from megashear.commands.plan import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
