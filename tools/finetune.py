"""`megashear finetune` as a script of the checkout."""

import sys

from megashear.commands.finetune import main

if __name__ == "__main__":  # worker processes re-import this module
    raise SystemExit(main(sys.argv[1:]))
