import sys

from l3paper.experiments.runs import main

sys.exit(main())
