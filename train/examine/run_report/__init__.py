"""`manyheads report`: everything that a run recorded, as one page."""
