"""Real data sets, split over the devices of a fleet."""
