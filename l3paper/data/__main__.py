import sys

from l3paper.data.streams import main

sys.exit(main())
