"""What the notebooks call: training runs (`lab`), figures, statistics of preference data, and loss landscapes.

Nothing else in the package imports this wing.
"""
