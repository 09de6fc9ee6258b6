"""What training a cross-layer transcoder costs: measurements, and the figures as measured. Not installed."""
