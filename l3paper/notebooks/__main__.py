import sys

from l3paper.notebooks.execution import main

sys.exit(main())
