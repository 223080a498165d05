"""AlexNet as in the 2012 paper: two towers, in one process or in two."""
