import sys

from l3paper.insight.record import main

sys.exit(main())
