"""Ways in which a file of JSON is damaged by a loss of power, a bad disk or an editor."""

import json

# Put in the place of any value.
OTHERS = (None, True, -1, 0, 1.5, 10**400, float("inf"), "x", "", "²", [], [0], {}, {"x": 1})
# Put in the place of a file.
CONTENTS = (b"", b"\xff\xfe", b"[]", b"{}", b"3", b"null", b'"x"', b"[" * 50_000, b'{"a": 1e400}')


def mutations(draw, content, *, lines):
    """Damage a file in one place, each of whose `lines` is JSON by itself; returns what was done, and the content."""
    how = draw.choice(("drop", "drop", "change", "change", "change", "cut", "garble", "zeros", "replace"))
    place = draw.randrange(len(content) + 1)
    if how == "cut":
        return f"cut at {place}", content[:place]
    if how == "zeros":
        return f"zeros from {place}", content[:place] + bytes(len(content) - place)
    if how == "garble":
        count = draw.choice((1, 1, 4, 40))
        return f"{count} bytes at {place}", content[:place] + draw.randbytes(count) + content[place + count :]
    if how == "replace":
        whole = draw.choice(CONTENTS)
        return f"replaced by {whole[:12]!r}", whole
    rows = content.splitlines(keepends=True) if lines else [content]
    if not rows:
        return "left empty", content
    number = draw.randrange(len(rows))
    value = json.loads(rows[number])
    what = _edit(draw, value, how)
    # What is no number in JSON stands there as one that is too large.
    rows[number] = json.dumps(value).replace("Infinity", "1e400").encode() + b"\n" * lines
    return what, b"".join(rows)


def _edit(draw, value, how):
    """Drop or change one value somewhere in a value, in place; returns what was done."""
    path = []
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return f"nothing in {path}"
        key = draw.choice(keys)
        path.append(key)
        inner = value[key]
        if isinstance(inner, (dict, list)) and inner and draw.random() < 0.8:
            value = inner
            continue
        if how == "drop":
            del value[key]
        else:
            value[key] = draw.choice(OTHERS)
        return f"{how} {path}: {str(inner)[:20]}" + (f" to {str(value[key])[:20]}" if how == "change" else "")
