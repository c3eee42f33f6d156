"""One address in front of several regions: the nearest that is up answers, writes reach all of them."""
