"""What papers claim about the methods of posttrain, measured with posttrain's own parts (`make claims`)."""
