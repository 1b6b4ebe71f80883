"""Runs a compiler; fails, too, where ptxas notes that it runs Hopper code otherwise than written.

Products one after the other (C7510 to C7520) or an ignored setmaxnreg (C7508) are notes to it, of
which no flag makes errors.
"""

import re
import subprocess
import sys

run = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
sys.stdout.write(run.stdout)
sys.exit(run.returncode or bool(re.search(r"\(C75\d\d\)", run.stdout)))
