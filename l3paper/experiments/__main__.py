import sys

from l3paper.experiments.command import main

sys.exit(main())
