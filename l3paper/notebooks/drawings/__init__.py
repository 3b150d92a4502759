"""The figures of the notebooks, one module per notebook: functions from numbers to a figure."""
