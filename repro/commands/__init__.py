"""What `repro` can be told: a command is the `main` of the module of its name, or stands in `ELSEWHERE`."""

COMMANDS = {
    "reproduce": "run a recipe and hold the result against its targets (default: pocket, offline, minutes on a CPU)",
    "verify": "hold finished runs, one or one for each seed, against a recipe's targets: PASS, FAIL or CANNOT TELL",
    "report": "put runs on one page: verdict, curves, pictures with captions, statistics, settings",
    "train": "fine-tune, evaluate and predict with the example's documented flags",
    "caption": "caption pictures: files, folders, patterns, or a list of names from standard input",
    "create-model": "join a vision encoder and a text decoder into a model folder",
    "export": "write a model in both formats, for Flax and for PyTorch",
    "selftest": "run the reference's recorded cases on this machine: after an upgrade of jax, a driver or a library",
    "env": "print versions, devices and settings, for a bug report",
    "data": "download COCO 2017, render scenes, or look at what a run would read",
}
# Module and function of the small commands, several to a module.
ELSEWHERE = {
    "create-model": ("models", "create_model"),
    "export": ("models", "export"),
    "env": ("machine", "env"),
    "selftest": ("machine", "selftest"),
    "report": ("verify", "report"),
}
INPUT_ERROR = 2
# Plus the signal's number: a command that was asked to stop.
SIGNALLED = 128
