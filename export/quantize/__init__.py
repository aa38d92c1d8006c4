"""8-bit convolutions by explicit Q/DQ nodes: calibration on the user's own frames, and a report on what they cost in quality."""
