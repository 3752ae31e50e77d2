"""Put the stored results of seq2seq.py into notebook 08b: sections "With seeds" and "A translator that is one".

    python /work/ed18/apply.py CHECKOUT [RESULTS.json] [--out FILE]

CHECKOUT: the worktree whose notebook is edited; RESULTS.json: default CHECKOUT/tests/benchmarks/results/seq2seq.json.
--out: write the edited notebook there instead (for a trial on toy rows).  Can be run again: it replaces what it put in.
Cells get outputs by `python tests/notebooks/run.py --refresh 08b_sequence_to_sequence`, afterwards url.py and gate.py.
"""
import argparse, json, sys
from collections import defaultdict
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("checkout", type=Path)
parser.add_argument("results", type=Path, nargs="?")
parser.add_argument("--out", type=Path)
args = parser.parse_args()
root = args.checkout.resolve()
sys.path[:0] = [str(root), str(root / "tests" / "notebooks")]
import cells
import ftlib
import nbformat

path = root / "notebooks" / "08b_sequence_to_sequence.ipynb"
stored = json.loads((args.results or root / "tests/benchmarks/results/seq2seq.json").read_text())


def runs_of(part):
    found = defaultdict(list)
    for row in sorted(stored["rows"], key=lambda row: row.get("seed", 0)):
        if row["part"] == part:
            found[row["way"]].append(row)
    return found


def gaps_of(part, base, key="score"):
    scores = {way: [row[key] for row in rows] for way, rows in runs_of(part).items()}
    seeds = len(scores[base])
    return ftlib.against({way: own * (seeds // len(own)) for way, own in scores.items()}, base)


def trained(part):
    return [way for way, rows in runs_of(part).items() if "steps" in rows[0]]


NUMBER = {1: "one seed", 2: "two seeds", 3: "three seeds", 4: "four seeds", 5: "five seeds"}


def mean(part, way, key="score"):
    rows = runs_of(part)[way]
    return sum(row[key] for row in rows) / len(rows)


# ------------------------------------------------------------------------------------------------ titles and French
few, many, *lora = trained("titles")
few_french, many_french = trained("french")
titles, french = gaps_of("titles", many), gaps_of("french", many_french)
first = runs_of("titles")[many][0]
seeds = NUMBER[len(runs_of("titles")[many])]
tested, tested_french = (len(runs_of(part)[way][0]["each"]) for part, way in (("titles", many), ("french", many_french)))
epochs = first["steps"] * 8 / int(few.replace(",", "")), runs_of("french")[few_french][0]["steps"] * 16 / int(few_french.replace(",", ""))


def told(gap, digits, more, less, tie, **words):
    """A sentence by the verdict on (other less base)."""
    text = f"{gap:.{digits}f}" if len(runs_of("titles")[many]) > 1 else f"{gap.value:+.{digits}f}, one seed"
    return {"more": more, "less": less, "tie": tie}[gap.verdict].format(gap=text, **words)


def lead(title, *sentences):
    return f"* **{title}** " + " ".join(sentences)


before = told(titles["as it comes"], 3, "For titles it made things worse: the model as it comes less the trained one {gap}",
              "Yes: the model as it comes is behind the trained one, for titles by {gap} ROUGE-L",
              "For titles that is not shown: the model as it comes less the trained one {gap}, a tie")
before_french = told(french["as it comes"], 1, "for French it made things worse ({gap})", "for French by {gap} chrF",
                     "for French it is a tie ({gap} chrF)")
ahead = told(titles["first sentence"], 3,
             "No: by ROUGE-L the sentence less the trained model is {gap}.",
             "Yes, by ROUGE-L: the sentence less the trained model is {gap}. What a few dozen articles and one training could "
             "not show, {seeds} and {n} articles can.",
             "Still a tie by ROUGE-L ({gap}). The sentence costs nothing, and who wants more must train for longer.",
             n=tested, seeds=seeds)
seen = dict(few=few, many=many, times=f"{epochs[0]:.0f}")
more_titles = told(titles[few], 3, "For titles, no: {few} abstracts seen {times} times, less {many} seen once, {gap}",
                   "For titles, yes: {few} abstracts seen {times} times, less {many} seen once, {gap}",
                   "For titles that is not shown: {few} abstracts seen {times} times, less {many} seen once, {gap}, a tie", **seen)
seen = dict(few=few_french, many=many_french, times=f"{epochs[1]:.0f}")
more_french = told(french[few_french], 1, "for French, no: {few} pairs seen {times} times, less {many} seen once, {gap} chrF.",
                   "for French, yes: {few} pairs seen {times} times, less {many} seen once, {gap} chrF.",
                   "for French it is not shown: {few} pairs seen {times} times, less {many} seen once, {gap} chrF, a tie.", **seen)
with_lora = told(titles[lora[0]], 3, "It is ahead of training all layers ({gap} ROUGE-L).",
                 "It is behind training all layers ({gap} ROUGE-L).",
                 "A tie with training all layers ({gap} ROUGE-L).") if lora else ""

WITH_SEEDS = f"""## With seeds

One training and a few dozen texts decide little, as the ties above show. The program `tests/benchmarks/seq2seq.py` asked
the same questions with {seeds}, and tested on {tested} articles and {tested_french} sentences. Its rules: each way to train
has its own learning rate, searched by the answers to validation rows with a seed that serves for nothing else, until both
neighbors were worse; the ways of one task make equally many updates; all answer the same test rows.

Two questions are new. What do **more examples** bring when the number of updates stays: {many} abstracts seen once, or {few}
seen {epochs[0]:.0f} times? And what does **LoRA** (notebook 03b), which leaves the model as it is and trains small matrices
beside it?"""

STORED = '''stored = ftlib.stored_results("seq2seq")
newest = stored["rows"][-1]
versions = ", ".join(f"{package} {number}" for package, number in newest["versions"].items())
print(f"{stored['command']}\\n  {newest['device']}, {newest['date']}, {versions}")


def runs_of(part):
    """{way: its rows}: one a seed of what was trained, in order, and one of what was not."""
    found = defaultdict(list)
    for row in sorted(stored["rows"], key=lambda row: row.get("seed", 0)):
        if row["part"] == part:
            found[row["way"]].append(row)
    return found'''

COMPARED = '''def stored_table(part, base, score, digits):
    """How far every way is from `base`, seed by seed, and all of it as a table."""
    found, lines = runs_of(part), []
    scores = {way: [row["score"] for row in rows] for way, rows in found.items()}
    seeds = len(scores[base])
    gaps = ftlib.against({way: own * (seeds // len(own)) for way, own in scores.items()}, base)
    for way, rows in found.items():
        gap, own = gaps.get(way), scores[way]
        lines.append({
            "way": f"trained on {way}" if "steps" in rows[0] else way, "updates": rows[0].get("steps", "–"),
            "rate": f"{rows[0]['rate']:.1e}" if "rate" in rows[0] else "–",
            score: ftlib.mean_std(own) if len(own) > 1 else own[0], "words": np.mean([row["words"] for row in rows]),
            f"minus {base}": f"{gap:.{digits}f}" if gap else "–", "that is": gap.verdict if gap else "–",
        })  # fmt: skip
    return gaps, results_table(lines, digits={score: digits, "words": 1})'''

TITLES = f'''title_gaps, table = stored_table("titles", base="{many}", score="ROUGE-L", digits=3)
table'''

FRENCH = f'''french_gaps, table = stored_table("french", base="{many_french}", score="chrF", digits=1)
table'''


def verdicts(name, gaps):
    pairs = ", ".join(f'"{way}": "{gap.verdict}"' for way, gap in gaps.items())
    return f"{name} = {{{pairs}}}"


CHECK = f'''{verdicts("of_titles", titles)}
{verdicts("of_french", french)}
for gaps, said_of in ((title_gaps, of_titles), (french_gaps, of_french)):
    assert {{way: gap.verdict for way, gap in gaps.items()}} == said_of  # what is said below'''.replace("= {", "= {", 1)

READ = "\n".join([
    "By the rule of notebook 03: a tie where the 95 % interval of the difference holds 0, corrected for the comparisons of a "
    "table (Holm), so that a tie may have an interval that lies a little beside 0.", "",
    lead("Does training help?", f"{before}, {before_french}."),
    lead("Is it better than the first sentence?", ahead),
    lead("More examples, at as many updates?", f"{more_titles};", more_french),
    lead("LoRA?", with_lora) if lora else "",
    "", "French is still French words beside one another: a mean of seeds is no translator either.",
])

# ------------------------------------------------------------------------------------------------ the translator
opus = []
if runs_of("opus"):
    [tuned] = trained("opus")[-1:]
    rows, came = runs_of("opus")[tuned], runs_of("opus")["as it comes"][0]
    gap = ftlib.paired([row["score"] for row in rows], came["score"])
    other = ftlib.paired([row["others"] for row in rows], came["others"])
    many_seeds = len(rows) > 1
    shown = (lambda g: f"{g:.1f}") if many_seeds else (lambda g: f"{g.value:+.1f}")
    percent = lambda value: f"{100 * value:.0f} %"  # noqa: E731
    now = {form: sum(row["address"][form] for row in rows) / len(rows) for form in ("vous", "tu")}
    was, wanted = came["address"], came["wanted"]
    gain = {"more": f"Tuning brings {shown(gap)} chrF.", "less": f"Tuning costs {shown(gap)} chrF.",
            "tie": f"By chrF no gain is shown ({shown(gap)}, a tie)."}[gap.verdict]
    rest = {"more": f"Where the reference says neither, {shown(other)} remain: tuning brought more than a form of address.",
            "less": f"Where the reference says neither, it lost: {shown(other)}.",
            "tie": f"Where the reference says neither, it is a tie ({shown(other)})."}[other.verdict]
    nearer = abs(now["tu"] - wanted["tu"]) < abs(was["tu"] - wanted["tu"])
    habit = ("Part of what it learned is a habit: English *you* is *vous* or *tu* in French, and no sentence alone says which. "
             if nearer else "English *you* is *vous* or *tu* in French, and no sentence alone says which. ")
    best = max(row["scores"]["bleu"] for rows_ in runs_of("french").values() for row in rows_)
    beyond = ('\nassert came["scores"]["bleu"] > 2 * max(row["scores"]["bleu"] for rows in runs_of("french").values() '
              'for row in rows)') if came["scores"]["bleu"] > 2 * best else ""
    opus = [("markdown", f"""### A translator that is one

How far is all this from a translator? `opus-mt-en-fr` (Tiedemann & Thottingal 2020) has 75 million parameters, no more than
our T5, and was trained for nothing else, on millions of pairs. The program gave it {tuned} pairs of Tatoeba, {rows[0]['steps']}
updates, again with its own rate and {NUMBER[len(rows)]}, and tested on {len(came['each'])} sentences of any length. Its 377 MB
are fetched only by name (`python -m ftlib data fetch opus-mt-en-fr`), so the table is from the stored results."""),
            ("code", f'''opus = runs_of("opus")
came, tuned = opus["as it comes"][0], opus["{tuned}"]
lines = [{{"translator": "as it comes", "BLEU": came["scores"]["bleu"], "chrF": came["score"], **came["address"]}}]
tuned_says = {{form: np.mean([row["address"][form] for row in tuned]) for form in ("vous", "tu")}}
bleus, chrfs = ([row["scores"][key] for row in tuned] for key in ("bleu", "chrf"))
spread = {{name: ftlib.mean_std(own) if len(own) > 1 else own[0] for name, own in (("BLEU", bleus), ("chrF", chrfs))}}
lines.append({{"translator": f"tuned, rate {{tuned[0]['rate']:.1e}}", **spread, **tuned_says}})
lines.append({{"translator": "the references", "BLEU": 100.0, "chrF": 100.0, **came["wanted"]}})
headings = {{key: key for key in lines[0]}} | {{"vous": "say vous", "tu": "say tu"}}
display(results_table(lines, headings, digits={{"BLEU": 1, "chrF": 1, "vous": 2, "tu": 2}}))
gained = ftlib.paired([row["score"] for row in tuned], came["score"])
elsewhere = ftlib.paired([row["others"] for row in tuned], came["others"])
print(f"chrF, tuned less as it comes: {{gained:.1f}}, {{gained.verdict}}; "
      f"where the reference says neither: {{elsewhere:.1f}}, {{elsewhere.verdict}}")
assert (gained.verdict, elsewhere.verdict) == ("{gap.verdict}", "{other.verdict}"){beyond}'''),
            ("markdown", f"""{gain} {habit}In the references {percent(wanted['vous'])} say *vous*
and {percent(wanted['tu'])} *tu*; the translator as it comes {percent(was['vous'])} and {percent(was['tu'])}, tuned
{percent(now['vous'])} and {percent(now['tu'])}. {rest}

Beside it our T5 is a toy, by the tables and by its sentences, and the size is not the reason: what each was trained on is. One
warning: its makers probably trained it on sentences of
Tatoeba, so these are no new texts to it, and its score says little about yours."""),
            ("code", f'''if env.pick(small=False, full=True) and ftlib.assets.describe(["opus-mt-en-fr"])[0]["present"]:
    opus_model = ftlib.load_model("opus-mt-en-fr", task="seq2seq-lm").to(env.device)  # pip install sentencepiece
    translations = ftlib.generate(opus_model, english[:6], max_new_tokens=40, autocast=half())
    for text, translation, reference in zip(english, translations, french, strict=False):
        print(f"{{text}}  →  {{translation}}   ({{reference}})")
else:
    print("with FTLIB_SIZE=full, and once opus-mt-en-fr is fetched, it translates here")''')]

NEW = [("markdown", WITH_SEEDS), ("code", STORED), ("code", COMPARED), ("code", TITLES), ("code", FRENCH), ("code", CHECK),
       ("markdown", READ), *opus]
MARK = "stored-seq2seq"


def wrapped(text, width=120):
    """Paragraphs and bullets of a markdown cell, each wrapped at 120 characters."""
    import textwrap

    done = []
    for block in text.split("\n\n"):
        lines, parts = block.split("\n"), []
        for line in lines:
            if line.startswith("* ") or line.startswith("#") or not parts:
                parts.append(line)
            elif line:
                parts[-1] += " " + line
        done.append("\n".join(textwrap.fill(part, width, subsequent_indent="  " if part.startswith("* ") else "",
                                            break_long_words=False, break_on_hyphens=False) for part in parts))
    return "\n\n".join(done)


notebook = nbformat.read(path, 4)
titles_of = [cell.source.split("\n")[0] for cell in notebook.cells]
at = next(i for i, cell in enumerate(notebook.cells) if cell.source.startswith("By the scores it has learned something")) + 1
end = next(i for i, cell in enumerate(notebook.cells) if cell.source.startswith("## Where the decoder looks"))
del notebook.cells[at:end]  # what an earlier run put there
made = [nbformat.v4.new_code_cell(source) if kind == "code" else nbformat.v4.new_markdown_cell(wrapped(source))
        for kind, source in NEW]
notebook.cells[at:at] = made
for cell in made:
    lines = cell.source.splitlines()
    assert len(lines) <= 25 and max(map(len, lines)) <= 120, (len(lines), max(lines, key=len))
REFERENCE = ("* Tiedemann & Thottingal (2020): OPUS-MT: building open translation services for the world. EAMT.")
references = [cell for cell in notebook.cells if "* Vaswani et al. (2017)" in cell.source]
if opus and REFERENCE not in references[0].source:
    references[0].source = references[0].source.replace("* Vaswani et al. (2017)", f"{REFERENCE}\n* Vaswani et al. (2017)")
plain = json.loads(nbformat.writes(notebook))
for cell in plain["cells"]:
    cell["source"] = cells.source(cell) if isinstance(cell["source"], list) else cell["source"]
cells.add_contents(plain)
cells.name_cells(plain)
nbformat.write(nbformat.from_dict(plain), args.out or path)
print(f"{len(made)} cells in {args.out or path}")
