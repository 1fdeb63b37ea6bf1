"""`elm-mlx data`: training data as a model will see them."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from elm_mlx.cli import options
from elm_mlx.cli.screen import bad_records_named, bar, counted, line, name_bad, say_all, terminal_width, visible
from elm_mlx.cli.training import mixed
from elm_mlx.errors import InputError
from elm_mlx.train.setting_fields import abouts
from elm_mlx.train.settings import DataSettings

if TYPE_CHECKING:
    from elm_mlx.data.encoding import Example, Names
    from elm_mlx.data.examples import Prepared
    from elm_mlx.text.tokenizer import Tokenizer

_PAIRS = "pairs"  # of answers: what dpo trains on
_SHOWN = 5  # examples
_HEAD, _TAIL = 160, 80  # tokens of a long one
_BINS = 12
_BAR = 40
_BATCH = 4  # rows, for the share of padding without packing

_ABOUT = {name: about[:1].upper() + about[1:] for name, about in abouts(DataSettings).items()}

_ABOUT_PATHS = "Data files, directories with train, valid and test, or hub:OWNER/NAME; all of them together."

PANELS = {
    "Records": ("format", "weight", "columns", "template", "max_seq_length", "truncate", "train_on_prompt", "skip_bad")
}


def data(
    ctx: typer.Context,
    paths: Annotated[list[str] | None, typer.Argument(metavar="[PATH...]", help=_ABOUT_PATHS)] = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", help="The model to train, a directory or OWNER/NAME on the hub. (no default)"),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="In place of both, a recipe of `pretrain`: sample its mixture.")
    ] = None,
    format: Annotated[options.RecordFormat | None, typer.Option(help=_ABOUT["format"])] = None,
    weight: Annotated[list[float] | None, typer.Option(help=_ABOUT["weight"].replace("--data", "PATH"))] = None,
    columns: Annotated[list[str] | None, typer.Option(help=_ABOUT["columns"])] = None,
    template: options.ChatTemplate = None,
    max_seq_length: Annotated[int | None, typer.Option(help=_ABOUT["max_seq_length"])] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help=_ABOUT["truncate"])] = False,
    train_on_prompt: Annotated[bool, typer.Option("--train-on-prompt", help=_ABOUT["train_on_prompt"])] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help=_ABOUT["skip_bad"])] = False,
) -> None:
    """Check training data, and show it as the model will see it: counts, lengths, packing, examples."""
    if config is not None:
        options.refuse_others(ctx, ["config"], "--config has all that a mixture is read by")
        _print_mixture(config)
        return
    if not paths or model is None:
        raise InputError(f"{'--model' if paths else 'PATH'} is missing; or a recipe, by --config")
    from elm_mlx.data import examples, records
    from elm_mlx.data.columns import parsed
    from elm_mlx.model.config import read_config
    from elm_mlx.text.chat_template import choose
    from elm_mlx.text.tokenizer import read_vocabulary

    model = options.directory_of(model)
    shape = read_config(model, with_tokenizer=True)
    tokenizer = read_vocabulary(model, shape).tokenizer
    assert tokenizer is not None
    chosen = choose(model, tokenizer, template)
    length = examples.longest(shape) if max_seq_length is None else max_seq_length
    context = shape.max_context_length
    taken = parsed(columns or ())
    paired = format == _PAIRS or (format is None and records.are_pairs(paths[0], taken))
    if paired and train_on_prompt:
        raise InputError(f"{paths[0]}: holds pairs, of which answers alone are trained: leave out --train-on-prompt")
    with bad_records_named(", ".join(paths)):
        splits = examples.load(
            paths, tokenizer, chosen, length, context=context, format=None if paired else format, paired=paired,
            columns=taken, train_on_prompt=train_on_prompt, truncate=truncate, skip_bad=skip_bad,
        )  # fmt: skip
    for name, prepared in splits.items():
        name_bad(prepared.bad)
        _print_split(name, prepared, paired, (weight or ()) if name == "train" else ())
    _print_examples(splits["train"], tokenizer, paired)


def _print_mixture(config: Path) -> None:
    """Prints what a recipe's sources yield, by a million tokens of them."""
    from elm_mlx.data import stream
    from elm_mlx.train import pretraining_recipe, sections

    plan = sections.read(config, pretraining_recipe.Recipe)
    found = stream.sample(plan.data.sources, Path(plan.tokenizer), plan.filters, plan.reading(), on_wrong=_warn)
    what = "all there is" if found.whole else "from the beginning"
    speed = f"{found.tokens_per_second:,.0f} tokens/s with {counted(plan.data.workers, 'worker')}"
    print(f"{found.tokens:,} tokens, {what}; {speed}, after {found.opening_seconds:.1f} s to start")
    for part in found.parts:
        counts = part.counts
        lines = [
            ("share", f"{part.share:.1%} of the tokens; the weights say {part.wanted:.1%}"),
            ("kept", f"{counts.kept:,} of {counts.read:,} documents, {counts.tokens:,} tokens"),
            *(("dropped", f"{number:,} {reason}") for reason, number in counts.dropped.items() if number),
            *([("bad", f"{counted(counts.bad, 'record')}")] if counts.bad else []),
            *(("broken", reason) for reason in counts.broken),
        ]
        line(part.source.name)
        say_all(lines, indent=2)


def _warn(text: str) -> None:
    line(text, err=True)


def _print_split(name: str, prepared: Prepared, paired: bool, weights: Sequence[float]) -> None:
    from elm_mlx.data.batches import Batches, PairBatches

    examples, length, total = prepared.examples, prepared.max_length, len(prepared.examples)
    kinds = ", ".join(counted(count, each.lower()) for each, count in prepared.counts.items())
    kind, heading, answers, measured = Batches, f"{counted(total, 'example')} of {kinds}", "", ""
    if paired:
        kind, length = PairBatches, 2 * length  # a row has room for both answers of the longest pair
        heading, measured = f"{counted(total // 2, 'pair')} of answers, for `elm-mlx dpo`", "of the longer answer: "
        medians = (statistics.median_low(sum(each.trained) for each in examples[half::2]) for half in (0, 1))
        answers = "median {} chosen, {} rejected".format(*(counted(median, "token") for median in medians))
    counts = [count // (2 if paired else 1) for _, count in prepared.parts]
    rows = kind(examples, 1, length, counts=counts, weights=weights)
    grouped = kind(examples, _BATCH, length, packed=False, counts=counts, weights=weights)
    print(f"{name}: {heading}")
    share = prepared.trained_tokens / prepared.tokens
    lines = [
        # Elsewhere what kinds of examples there are says it.
        (
            "format",
            ", ".join(f"{name} ({count:,})" for name, count in prepared.formats.items())
            if "conversation" in prepared.counts
            else "",
        ),
        *_remarks(prepared),
        *mixed(prepared, rows.draws),
        ("tokens", f"{prepared.tokens:,}, {prepared.trained_tokens:,} of them trained ({share:.1%})"),
        ("answers", answers),
        ("packed", f"{counted(rows.steps(), 'row')} of {length:,} tokens, {rows.fill():.1%} full"),
        ("unpacked", f"batches of {_BATCH} by length, {grouped.fill():.1%} full"),
        ("lengths", f"{measured}median {statistics.median_low(prepared.lengths):,}, longest {prepared.longest[0]:,}"),
    ]
    say_all(lines, indent=2)
    _print_histogram(prepared)


def _remarks(prepared: Prepared) -> Iterator[tuple[str, str]]:
    if prepared.bad:
        yield "bad", f"{counted(len(prepared.bad), 'record')} left out"
    yield from prepared.remarks()


def _print_histogram(prepared: Prepared) -> None:
    bins = list(_histogram(prepared.lengths, prepared.max_length))
    most = max(count for _, count in bins)
    width = max(len(label) for label, _ in bins)
    room = max(1, min(_BAR, terminal_width() - width - 17))
    for label, count in bins:
        print(f"    {label:>{width}}  {bar(count / most, room) if count else '':<{room}} {count:>9,}")


def _histogram(lengths: Sequence[int], limit: int) -> Iterator[tuple[str, int]]:
    """Yields a few intervals of lengths up to `limit`, and one above it, with how many lengths lie in each."""
    fitting = [length for length in lengths if length <= limit]
    if fitting:
        width = 1
        while (max(fitting) - 1) // width - (min(fitting) - 1) // width >= _BINS:
            width *= 2
        for below in range((min(fitting) - 1) // width * width, max(fitting), width):
            last = min(below + width, limit)
            label = f"{below + 1:,} to {last:,}" if below + 1 < last else f"{last:,}"
            yield label, sum(below < length <= last for length in fitting)
    if len(fitting) < len(lengths):
        yield f"over {limit:,}", len(lengths) - len(fitting)


def _print_examples(prepared: Prepared, tokenizer: Tokenizer, paired: bool) -> None:
    """Prints a few examples from all over the data."""
    from elm_mlx.data.encoding import Names

    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    each = 2 if paired else 1
    total = len(prepared.examples) // each
    count = min(_SHOWN, total)
    names = Names(tokenizer)
    print(f"\nWhat is trained is {typer.style('green', fg='green') if colour else 'in ⟦ ⟧'}.")
    if prepared.written:
        line(f"‹{next(iter(prepared.written))}› is that name in letters, without ‹ › the token.")
    for shown in range(count):
        number = shown * total // count
        first, *others = prepared.examples[each * number : each * (number + 1)]
        print()
        lengths = " and ".join(counted(len(example.ids), "token") for example in (first, *others))
        line(f"{'pair' if paired else 'example'} {number + 1:,}: {prepared.sources[each * number]}, {lengths}")
        if not others:
            print("    " + _marked(_texts(first, tokenizer), names, colour).replace("\n", "\n    "))
            continue
        # Both answers follow the same tokens, which are shown once.
        chosen, rejected = (_texts(example, tokenizer) for example in (first, *others))
        asked = first.trained.index(True)
        for label, tokens in (("", chosen[:asked]), ("chosen", chosen[asked:]), ("rejected", rejected[asked:])):
            print(f"{label:<10}  " + _marked(tokens, names, colour).replace("\n", "\n" + 12 * " "))


class _Token(NamedTuple):
    """A token as text, a control token by its name."""

    text: str
    trained: bool
    control: bool


def _texts(example: Example, tokenizer: Tokenizer) -> list[_Token]:
    """Decodes an example, token by token."""
    names = {token: name for name, token in tokenizer.control_ids.items()}
    decoder = tokenizer.detokenizer()
    texts = [decoder.add(token) + names.get(token, "") for token in example.ids]
    texts[-1] += decoder.finish()
    return [
        _Token(text, trained, token in names)
        for text, trained, token in zip(texts, example.trained, example.ids, strict=True)
    ]


def _marked(tokens: Sequence[_Token], names: Names, colour: bool) -> str:
    """The text of tokens, what is trained marked, and `names` that are letters; of many, both ends."""
    if len(tokens) <= _HEAD + _TAIL:
        return _joined(tokens, names, colour)
    hidden = len(tokens) - _HEAD - _TAIL
    head, tail = (_joined(part, names, colour) for part in (tokens[:_HEAD], tokens[-_TAIL:]))
    return f"{head}\n… {hidden:,} tokens …\n{tail}"


def _joined(tokens: Sequence[_Token], names: Names, colour: bool) -> str:
    output = []
    for trained, run in groupby(tokens, key=lambda token: token.trained):
        text = ""
        for control, same in groupby(run, key=lambda token: token.control):
            piece = visible("".join(token.text for token in same))
            text += piece if control else names.marked(piece)
        output.append(text if not trained else typer.style(text, fg="green") if colour else f"⟦{text}⟧")
    return "".join(output)
