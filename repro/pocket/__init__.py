"""The data set that needs no network: rendered scenes, their captions, and what a caption says that is true."""
