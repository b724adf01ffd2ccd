"""`repro train`: one run by the documented flags."""

from __future__ import annotations

from repro.commands import COMMANDS
from repro.commands.terminal import figures, make_deterministic, print_end, start_logging
from repro.config import ARGUMENTS, HALVES, SEVERAL, parse_arguments

ABOUT = (
    f"{COMMANDS['train']}; what the example does not have is marked `Further:`. Ten flags do for a start:"
    " --model_name_or_path, --train_file, --validation_file, --output_dir, --do_train, --do_eval,"
    " --predict_with_generate, --max_target_length, --num_train_epochs and --per_device_train_batch_size"
)


def main(argv: list[str]) -> int:
    parsed = parse_arguments(ARGUMENTS, argv, command="train", about=ABOUT)
    args = parsed[-1]
    if args.deterministic:
        make_deterministic()
    models = [value for name, value in vars(parsed[0]).items() if name.startswith((*HALVES, "model_name"))]
    first = f"run in {args.output_dir}: starting JAX and transformers"
    start_logging(first, quiet=bool(args.process_id), models=models, imports=("repro.run.train",))
    from repro.run.train import run
    from repro.training.processes import is_first, start_processes

    start_processes(**{name: getattr(args, name) for name in SEVERAL})
    result = run(*parsed)
    if not is_first():
        return 0
    from repro.reports.write import report_at_end

    report_at_end(result.folder)
    for prefix, evaluation in result.evaluations.items():
        print(f"\n{'validation' if prefix == 'eval' else prefix}", *figures(evaluation.metrics), sep="\n")
    print_end(result.folder, result.facts, result.folder)
    return 0
