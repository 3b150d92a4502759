"""The paper's claims, held against the records: `python -m l3paper.claims`."""

from l3paper.experiments.claims import table
from l3paper.records import markdown

if __name__ == "__main__":
    print(markdown(table()))
