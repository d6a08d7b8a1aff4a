"""`python -m peft_run` is the command `peft`, for environments where the script is not on the PATH."""

import sys

from peft_run.cli import main

sys.exit(main())
