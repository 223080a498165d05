"""The data set as one row per image: archives walked once, read in place ever after."""
