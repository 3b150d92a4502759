import sys

from l3paper.bench.lookup import main

sys.exit(main())
