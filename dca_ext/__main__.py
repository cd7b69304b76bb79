"""``python -m dca_ext`` is the console command ``dca-ext``."""

import sys

from dca_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
