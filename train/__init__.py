"""One loop that joins the pipeline and the network, and everything around it."""
