"""Write the measured tables and pictures from the stored results.

python tests/benchmarks/report.py    # rewrites README.md here between its markers, and the pictures
"""

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path

from ftlib import Difference, against, mean_std, paired, results_table
from ftlib.show.tables import format_cell

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests/benchmarks/results"


def stored(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def rows_of(name: str, **wanted) -> list[dict]:
    return chosen(stored(name)["rows"], **wanted)


def chosen(rows: list[dict], **wanted) -> list[dict]:
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def source(name: str) -> str:
    """Command, device, versions and dates of a results file, as one sentence."""
    content = stored(name)
    rows = content["rows"]
    dates = sorted({row["date"] for row in rows})
    devices = sorted({row["device"] for row in rows})
    versions = sorted({json.dumps(row["versions"], sort_keys=True) for row in rows})
    names = " or ".join(", ".join(f"{k} {v}" for k, v in json.loads(text).items()) for text in versions)
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"`{content['command']}`; {'; '.join(devices)}; {names}; {when}."


CORPORA = {"rotten-tomatoes": "film reviews", "banking77": "bank intents"}
SIGNS = {"more": " ↑", "less": " ↓", "tie": ""}
RULE = (
    "mean ± standard deviation over {seeds} seeds. An arrow: better or worse than {base}, seed by seed, where the 95 % "
    "interval of the mean difference does not hold 0, corrected for the number of comparisons in the column (Holm); "
    "without an arrow it is a tie"
)


def runs_of(rows: list[dict], name: str, value: Callable[[dict], float | None]) -> dict[str, list[float]]:
    """{row[name]: values in the order of the seeds}; rows without a value are left out."""
    found: dict[str, list[float]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        if (own := value(row)) is not None:
            found.setdefault(row[name], []).append(own)
    return found


def compared(runs: dict[str, list[float]], base: str) -> dict[str, str]:
    """Mean ± deviation of each, with an arrow where it differs from the base."""
    whole = {name: own for name, own in runs.items() if len(own) == len(runs[base])}  # others are on their way
    gaps = against(whole, base)
    return {
        name: format_cell(mean_std(own)) + (SIGNS[gaps[name].verdict] if name in gaps else "")
        for name, own in whole.items()
    }  # fmt: skip


def accuracies(corpus: str) -> dict[int, dict[str, list[float]]]:
    """{training texts: {strategy: test accuracies over seeds}}."""
    rows = rows_of(f"strategies-{corpus}", part="accuracy")
    return {
        count: runs_of(chosen(rows, count=count), "strategy", lambda row: row["test"])
        for count in sorted({row["count"] for row in rows})
    }


def strategies() -> str:
    costs = {row["strategy"]: row for row in rows_of("strategies-cost")}
    table: dict[str, dict] = {
        name: {"what moves": name, "trainable": row["trainable"]} for name, row in costs.items()
    }  # fmt: skip
    updates = []
    for corpus, words in CORPORA.items():
        for count, runs in accuracies(corpus).items():
            rows = rows_of(f"strategies-{corpus}", part="accuracy", count=count)
            updates.append(f"{rows[0]['steps']} on {count:,} {words}")
            rates = {row["strategy"]: row["rate"] for row in rows}
            for name, shown in compared(runs, "full").items():
                table[name] |= {f"{words}, {count:,}": shown, f"rate, {words}, {count:,}": f"{rates[name]:g}"}
    for name, row in costs.items():
        table[name] |= {
            "step, × full": row["of_full"], "peak MB": round(row["peak_mb"]), "moments MB": row["optimizer_mb"],
            "saved MB": row["bytes"] / 2**20,
        }  # fmt: skip
    columns = dict.fromkeys(name for line in table.values() for name in line)  # a strategy may lack one of the corpora
    lines = [{name: line.get(name, "") for name in columns} for line in table.values()]
    digits = {"step, × full": 2, "moments MB": 1, "saved MB": 1}
    stamps = "\n\n".join(f"*{source(f'strategies-{part}')}*" for part in (*CORPORA, "cost"))
    drawn = "![How far each strategy is from full fine-tuning](results/strategies.png)"
    return (
        "**Which parameters move** (notebook 03b): MiniLM, test accuracy after training on so many texts, "
        f"{RULE.format(seeds=5, base='full fine-tuning')}. Each strategy has its own learning rate for each corpus and "
        "size, searched uphill by validation accuracy, in factors of about three, until its neighbors are worse "
        "((IA)³'s is the largest tried; a second hill would not be found); all make as many "
        f"updates, in batches of 16 or 32: {', '.join(updates)}. "
        "The step is one of 32 film reviews with `unpad`, as a ratio to "
        "full fine-tuning's in the same round; peak memory is of the whole process; moments are what AdamW keeps; "
        "saved is what `ftlib.save` writes (adapters with their head).\n\n"
        f"{results_table(lines, digits=digits)._repr_markdown_()}\n\n"
        f"{drawn}\n\n{stamps}"
    )


TASKS = ("sentiment", "similarity", "intents")


def scored(part: str, task: str) -> dict[str, list[float]]:
    """{way: its scores of a task, or their mean ("mean"), over seeds}."""
    own = lambda row: row["mean"] if task == "mean" else row["scores"].get(task)  # noqa: E731
    return runs_of(rows_of("multitask", part=part), "way", own)


def multitask() -> str:
    """Two tasks of the same sentences, on an encoder each and on one; and where their rates come from."""
    shown = {task: compared(scored("atis", task), task) for task in ("intent", "slots")}
    rows = rows_of("multitask", part="atis")
    [steps], rates = {row["steps"] for row in rows}, {row["way"]: row["rate"] for row in rows}
    both = "intent+slots"
    table = [
        {"atis, all 4,122 sentences": words, "intent, accuracy": shown["intent"].get(way, ""),
         "slots, F1": shown["slots"].get(way, ""), "rate": f"{rates[way]:g}", "updates of 32": steps}
        for words, way in (("intent alone", "intent"), ("slots alone", "slots"), ("both on one encoder", both))
    ]  # fmt: skip
    return (
        "**Several tasks on one encoder** (notebook 05). Intents and slots of the same sentences, on the 850 test "
        f"sentences: {RULE.format(seeds=5, base='alone')}. Each way has a learning rate of its own, searched with "
        "another seed on validation sentences until the best lies inside those tried. The joint model makes as many "
        f"updates as each single one, so half of what the two make.\n\n{results_table(table)._repr_markdown_()}\n\n"
        f"*{source('multitask')}*"
    )


def methods() -> str:
    """Every method of balancing on three unlike tasks; the transfer matrix; what more tasks cost."""
    [steps] = {row["steps"] for row in rows_of("multitask", part="balancing")}
    return (
        "**Balancing several tasks** (notebook 05b): accuracy of sentiment (rotten-tomatoes) and of intents (the first "
        "ten of banking77), Pearson's r of similarity (stsb, standardized labels), on up to 1,000 test rows, "
        f"{RULE.format(seeds=5, base='fixed weights')}. For every method the same 300 rows of each task, {steps} "
        f"updates of 16, tasks drawn alike, at the learning rate of fixed weights.\n\n{balancing()}\n\n"
        "**Transfer** (notebooks 05 and 05b): what a task of 300 rows gains from a partner of 300, on the same "
        f"test rows, {RULE.format(seeds=5, base='half batches').replace('column', 'row')}. A "
        "pair makes twice the updates of one alone (200 in place of 100), so that each task makes as many passes over "
        "its rows as alone, with half of every batch of 16. The control is the task alone on half batches, as many of "
        "them: the same updates, passes and rows of the task, and no partner. Twice as long is alone on as many whole "
        f"batches, the total of the pair. Every way has a learning rate of its own.\n\n{transfers()}\n\n"
        f"*{source('multitask')}*\n\n{growth()}"
    )


def balancing() -> str:
    """The methods on the three tasks."""
    shown = {task: compared(scored("balancing", task), "fixed") for task in (*TASKS, "mean")}
    names = sorted(shown["mean"], key=lambda how: how != "fixed")  # which comes first
    lines = [{"method": f"`{how}`", **{task: own[how] for task, own in shown.items()}} for how in names]
    return results_table(lines)._repr_markdown_()


TEXT_TO_TEXT = {  # of seq2seq.py: what the rows are, the score, the way that the others are compared with
    "titles": ("titles of 80 abstracts, 24 updates of 8", "ROUGE-L", "192"),
    "french": ("French of 200 English sentences, 48 updates of 16", "chrF", "768"),
    "opus": ("a translator, French of 400 sentences, 125 updates of 16", "chrF", "2,000"),
}


def text_to_text() -> str:
    """Titles, French, and a translator that is tuned: what training brings, and what costs nothing."""
    tables = []
    for part, (words, measure, base) in TEXT_TO_TEXT.items():
        rows = rows_of("seq2seq", part=part)
        seeds = sum(row["way"] == base for row in rows)
        own = runs_of([{"seed": 0} | row for row in rows], "way", lambda row: row["score"])
        shown = compared({way: scores * (seeds // len(scores)) for way, scores in own.items()}, base)
        rates = {row["way"]: f"{row['rate']:g}" for row in rows if "rate" in row}
        lines = [
            {words: f"trained on {way}" if way in rates else way, measure: text.replace(" ± 0.000", ""),
             "rate": rates.get(way, "")}
            for way, text in shown.items()
        ]  # fmt: skip
        tables.append(results_table(lines)._repr_markdown_())
    joined = "\n\n".join(tables)
    return (
        "**Text to text** (notebook 08b): flan-t5-titles (77 million parameters) taught titles and French, and "
        f"opus-mt-en-fr (75 million) tuned: {RULE.format(seeds=3, base='training on the most rows')}. Each way to "
        "train has a learning rate of its own, searched with another seed on validation rows until the best lies "
        f"inside.\n\n{joined}\n\n*{source('seq2seq')}*"
    )


def transfers() -> str:
    """Every task alone, its controls, and with each of the others."""
    grid = []
    for task in TASKS:
        shown = compared(scored("transfer", task), f"{task}, half batches")
        line = {"task": task, "alone": shown[task]}
        line |= {what: shown[f"{task}, {what}"] for what in ("half batches", "twice as long")}
        pairs = {frozenset(way.split("+")): text for way, text in shown.items() if "+" in way}
        line |= {f"with {partner}": pairs.get(frozenset((task, partner)), "") for partner in TASKS}
        grid.append(line)
    return results_table(grid)._repr_markdown_()


def growth() -> str:
    """A step against the number of tasks: seconds as a ratio to a stock model with one task, memory as it is."""
    rows = rows_of("task_growth")
    table = []
    for tasks in sorted({row["tasks"] for row in rows if row["tasks"]}):
        line: dict = {"tasks": tasks}
        for row in (r for r in rows if r["tasks"] == tasks):
            peak = round(row["peak_gpu_mb"] or row["peak_mb"])
            words = "added up" if row["method"] == "added up" else f"`{row['method']}`"
            line[f"{words}, {row['labels']}"] = f"{row['against_stock']['median']:.2f} × · {peak:,} MB"
        table.append(line)
    names = dict.fromkeys(name for line in table for name in line)
    table = [{name: line.get(name, "") for name in names} for line in table]
    return (
        "**More tasks**: a step of 32 rows, unpadded, against the same step of a stock model with one task (median of "
        'ratios within rounds), and the peak memory of the process. "One label a row": the rows take turns, so more '
        'tasks are not more rows; "all labels": every row has a label of every task.\n\n'
        f"{results_table(table)._repr_markdown_()}\n\n*{source('task_growth')[:-1]}; {rows[0]['rounds']} rounds, "
        f"{rows[0]['threads']} thread{'; ' + rows[0]['remark'] if 'remark' in rows[0] else ''}.*"
    )


def differs(gap: Difference) -> str:
    return f"{gap:.3f}{SIGNS[gap.verdict]}"


def beside(rows: list[dict], base: str, columns: dict[str, str], *gains: str) -> dict[str, dict[str, str]]:
    """{way: cells}: of columns, {heading: key}, mean ± deviation, with an arrow where it differs from the base.

    Behind those in `gains` stands the difference with its 95 % interval.
    """
    lines: dict[str, dict[str, str]] = {}
    for heading, key in columns.items():
        runs = runs_of(rows, "way", lambda row, key=key: row.get(key))
        shown = compared(runs, base)
        gaps = against({way: runs[way] for way in shown}, base)
        for way, text in shown.items():
            line = lines.setdefault(way, {})
            line[heading] = text
            if heading in gains:
                line[f"{heading}, gain"] = differs(gaps[way]) if way in gaps else ""
    return lines


def of_one_rule(seeds: int, base: str) -> str:
    return RULE.format(seeds=seeds, base=base).replace("better or worse", "higher or lower")


def as_markdown(lines: list[dict], **options) -> str:
    return results_table(lines, **options)._repr_markdown_()


MORE_TEXT = ("nothing", "deletion", "swap", "synonyms", "mixup")


def generalizing() -> str:
    """More text from the text at every size; at one of them what holds a model back, with loss and calibration."""
    rows, table = rows_of("generalizing", part="test"), {}
    for count in sorted({row["count"] for row in rows}):
        own = [row for row in rows if row["count"] == count and row["way"] in MORE_TEXT]
        columns = {f"{count:,} labels, accuracy": "accuracy", f"{count:,}, cooled loss": "cooled_loss"}
        for way, line in beside(own, "nothing", columns, next(iter(columns))).items():
            table[way] = table.get(way, {"change": way}) | line
    held = {row["count"] for row in rows if row["way"] not in MORE_TEXT}
    [held] = held or {0}
    own = [row for row in rows if row["count"] == held and row["way"] not in MORE_TEXT[1:]]
    columns = {"accuracy": "accuracy", "loss": "loss", "cooled loss": "cooled_loss", "error": "error",
               "cooled error": "cooled_error"}  # fmt: skip
    found = {row["way"]: row for row in own}
    remedies = [
        {"remedy": way, "strength": f"{found[way]['strength'] or ''}", "rate": f"{found[way]['rate']:g}"} | line
        for way, line in (beside(own, "nothing", columns, "accuracy", "cooled loss") if own else {}).items()
    ]
    updates = sorted({(row["count"], row["steps"], row["batch"]) for row in rows})
    updates = ", ".join(f"{steps} of {batch} on {count:,}" for count, steps, batch in updates)
    words = rows_of("generalizing", part="masked words")
    said = f" Synonyms come from a masked model of loss {words[0]['loss']:.2f}." if words else ""
    columns = dict.fromkeys(name for line in table.values() for name in line)  # a way may be on its way
    lines = [{name: line.get(name, "") for name in columns} for line in table.values()]
    texts = [
        "**More text from the text** (notebook 09): MiniLM on film reviews, all of it learning, "
        f"{of_one_rule(5, 'nothing')}. All ways of a size learn from the same texts and make as many updates: "
        f"{updates}; each has a learning rate of its own, searched with another draw (swap and synonyms take "
        f"deletion's). The cooled loss is that after the temperature that is best on validation texts.{said}"
        f"\n\n{as_markdown(lines)}"
    ]
    if remedies:
        texts.append(
            f"**What holds a model back** (notebook 09), {held:,} labels, by the same rule. Error: the expected "
            "calibration error, 15 bins; cooled: after the temperature. Strength and rate of each are searched; "
            f"together: each at its weakest.\n\n{as_markdown(remedies)}"
        )
    return "\n\n".join([*texts, f"*{source('generalizing')}*"])


def pretraining() -> str:
    """Heads, going on with pretraining against the control and what tasks have of it, spans."""
    texts, name = [], "pretraining"
    if rows := rows_of(name, part="heads"):
        columns = {"loss before": "before", "loss after": "loss", "right after": "accuracy"}
        lines = [{"head": way} | line for way, line in beside(rows, "random", columns, "loss after").items()]
        texts.append(
            f"**A head on masked words** (notebook 06): MiniLM, {rows[0]['steps']} steps on WikiText-2, the masked "
            f"loss of test rows, {of_one_rule(5, 'the random head')}.\n\n{as_markdown(lines)}"
        )
    if rows := rows_of(name, part="going on"):
        columns = {"loss on PubMed": "PubMed", "loss on WikiText-2": "WikiText-2"}
        lines = [{"read": way} | line for way, line in beside(rows, "WikiText-2", columns, *columns).items()]
        lines = [{"read": "the common start"} | {heading: f"{row[key]:.3f}" for heading, key in columns.items()}
                 for row in rows_of(name, part="start")] + lines  # fmt: skip
        lines = [{key: line.get(key, "") for key in lines[-1]} for line in lines]
        texts.append(
            f"**Going on with pretraining** (notebook 06): {rows[0]['steps']} steps on abstracts of PubMed, or, as the "
            f"control, on WikiText-2, from one start; masked losses, {of_one_rule(5, 'the control')}."
            f"\n\n{as_markdown(lines)}"
        )
    table: dict[str, dict[str, str]] = {}
    for part, words in (("films", "films, accuracy"), ("names", "names, F1")):
        rows = rows_of(name, part=part)
        if not rows:
            continue
        for way, line in beside(rows, "WikiText-2", {words: "score"}, words).items():
            table[way] = table.get(way, {"encoder": way}) | line
        for way, line in beside(rows, "MiniLM", {words: "score"}, words).items():
            table.get(way, {})[f"{part}, less MiniLM"] = line[f"{words}, gain"]
    if table:
        columns = dict.fromkeys(key for line in table.values() for key in line)
        lines = [{key: line.get(key, "") for key in columns} for line in table.values()]
        texts.append(
            "What tasks have of it, fine-tuned: gains and arrows beside the means are against the control, those of "
            f"the last columns against MiniLM as it comes.\n\n{as_markdown(lines)}"
        )
    if rows := rows_of(name, part="spans"):
        before, after = ([row[key] for row in rows] for key in ("before", "loss"))
        gap = paired(after, before)
        texts.append(
            f"**Spans** (notebook 06): {rows[0]['steps']} steps of flan-t5-titles on paragraphs with spans left out: "
            f"the loss of test paragraphs falls from {before[0]:.2f} to {format_cell(mean_std(after), 2)} "
            f"({differs(gap)}, {len(rows)} seeds)."
        )
    return "\n\n".join([*texts, f"*{source(name)}*"])


def scaling() -> str:
    """The loss of every decoder after every number of tokens; what five seeds of the smallest differ by."""
    rows = rows_of("scaling", part="loss")
    first = min(row["seed"] for row in rows)
    sizes = sorted({(row["parameters"], row["width"], row["layers"], row["rate"]) for row in rows})
    budgets = sorted({row["tokens"] for row in rows})
    lines = []
    for parameters, width, layers, rate in sizes:
        own = {row["tokens"]: row for row in chosen(rows, width=width, layers=layers, seed=first)}
        line = {"width × layers": f"{width} × {layers}", "parameters": parameters, "rate": f"{rate:g}"}
        line |= {f"{tokens // 1000:,}k tokens": own[tokens]["loss"] if tokens in own else None for tokens in budgets}
        lines.append(line | {"operations, most tokens": f"{6 * parameters * budgets[-1]:.1e}"})
    again = [row["loss"] for row in rows if (row["parameters"], row["tokens"]) == (sizes[0][0], budgets[-1])]
    return (
        "**Scaling** (notebook 06): the loss of the next of 512 pieces, in nats, on test rows of WikiText-2, of "
        "decoders from nothing; each cell is a run of its own, to the end of its schedule. Operations are "
        "6 · N · D. The rate is searched for two widths; those of the others lie on the power of the width through "
        "both. One run each; "
        f"{len(again)} seeds of the smallest at the most tokens have {format_cell(mean_std(again))}."
        f"\n\n{as_markdown(lines)}\n\n*{source('scaling')}*"
    )


def another_language() -> str:
    """Counting and ALBERT on the same draws: against counting whole reviews, and on as much text as ALBERT reads."""
    rows = rows_of("another_language", part="test")
    table = beside(rows, "counting, whole", {"accuracy": "accuracy"}, "accuracy")
    runs = runs_of(rows, "way", lambda row: row["accuracy"])
    pairs = {way: way.replace("ALBERT", "counting") for way in table if way.startswith("ALBERT")}
    pairs = {way: other for way, other in pairs.items() if other in table}
    gaps = {way: [a - b for a, b in zip(runs[way], runs[other], strict=True)] for way, other in pairs.items()}
    gaps = against({"none": [0.0] * len(runs["counting, whole"]), **gaps}, "none")
    names = ("epochs", "rate", "C")
    settings = {row["way"]: [f"{name} {row[name]:g}" for name in names if name in row] for row in rows}
    lines = [
        {"way": way, "settings": ", ".join(settings[way]), **line,
         "against counting as much": differs(gaps[way]) if way in gaps else ""}
        for way, line in table.items()
    ]  # fmt: skip
    return (
        "**Counting against a small ALBERT** (notebook 06b): 640 hotel reviews in Chinese, accuracy on all test "
        f"reviews, {of_one_rule(5, 'counting whole reviews')}. Settings are searched on the validation reviews, with "
        f"another draw.\n\n{as_markdown(lines)}\n\n*{source('another_language')}*"
    )


def few_labels() -> str:
    """Accuracy against labels a class; intents never seen; which texts to label next."""
    rows, text = rows_of("few_labels", part="accuracy"), []
    for corpus, name in CORPORA.items():
        own = [row for row in rows if row["corpus"] == corpus]
        lines: dict[str, dict[str, str]] = {}
        for shots in sorted({row["shots"] for row in own}):
            runs = runs_of([row for row in own if row["shots"] == shots], "method", lambda row: row["accuracy"])
            shown = compared(runs, "probe") if shots else {way: f"{own[0]:.3f}" for way, own in runs.items()}
            for way, cell in shown.items():
                lines.setdefault(way, {})[str(shots)] = cell
        table = [{name: way, **{size: line.get(size, "") for size in map(str, (0, 2, 4, 8, 16, 32, 64))}}
                 for way, line in lines.items()]  # fmt: skip
        text.append(as_markdown(table))
    fresh = [row | {"way": row["method"]} for row in rows_of("few_labels", part="new intents")]
    table = beside(fresh, "prototypes", {"1 text an intent": "1", "5 texts": "5"})
    text.append(as_markdown([{"20 intents never seen": way, **line} for way, line in table.items()]))
    bought = rows_of("few_labels", part="active")
    for corpus, name in CORPORA.items():
        own = [row for row in bought if row["corpus"] == corpus]
        columns = {str(count): count for count in own[0]["labels"][1:]}
        spread = [row | {"way": row["how"], **dict(zip(row["labels"], row["accuracy"], strict=True))} for row in own]
        table = beside(spread, "random", columns)
        text.append(as_markdown([{f"{name}, labels bought": way, **line} for way, line in table.items()]))
    return (
        "**A few labels** (notebook 11): MiniLM, test accuracy against labels a class (SmolLM2 where it is prompted, "
        f"on 200 texts), {of_one_rule(5, 'the probe')}. The learning rates of fine-tuning and of contrastive tuning "
        "are searched with 64 labels a class of another draw and kept with fewer. Intents are the "
        f"first ten of banking77.\n\n{text[0]}\n\n{text[1]}\n\nTwenty of clinc150's intents at a time, of 40 that "
        "nothing was trained on; what is trained learned from 90 others. Arrows: against the pretrained encoder's "
        f"prototypes.\n\n{text[2]}\n\nWhich texts to label next: a probe on MiniLM's vectors, 20 draws of the first "
        f"ten labels, arrows against random ones.\n\n{text[3]}\n\n{text[4]}\n\n*{source('few_labels')}*"
    )


# programs whose rows need not be there yet
LATER = {"few_labels": few_labels, "generalizing": generalizing, "pretraining": pretraining, "scaling": scaling,
         "another_language": another_language}  # fmt: skip


TRAINER, BEST = "Trainer, as it comes", "Trainer, best settings found"
ENCODE = ("sentence-transformers encode", "a loop like sentence-transformers")
BERT = "BERT-base, bf16"
MM = "torch.mm"
# What is aimed at: (words, part, the work's name or "" for any, measured against, goal, goal on a CPU with AMX where it
# is another); no rival: utilisation.
GOALS = (
    ("fine-tune MiniLM, CPU", "fine-tune", "", TRAINER, 2.0, 5.0),
    ("fine-tune MiniLM, CPU", "fine-tune", "", BEST, 1.3, 1.6),
    ("fine-tune MiniLM, CPU", "fine-tune", "", None, 0.6, None),
    ("fine-tune MiniLM, CPU", "fine-tune", "", MM, 0.6, None),
    ("titles by flan-t5-small, CPU", "titles", "", TRAINER, 1.5, None),
    ("titles by flan-t5-small, CPU", "titles", "", BEST, 1.2, None),
    ("features of MiniLM, CPU", "features", "", ENCODE, 1.4, 2.0),
    ("features of MiniLM, CPU", "features", "", "ONNX Runtime", 1.0, None),
    ("features of MiniLM, CPU", "features", "", None, 0.8, None),
    ("features of MiniLM, CPU", "features", "", MM, 0.8, None),
    ("fine-tune BERT-base, GPU, batch 32", BERT, "train, batch 32", TRAINER, 3.0, None),
    ("fine-tune BERT-base, GPU, batch 32", BERT, "train, batch 32", BEST, 1.5, None),
    ("same, the Trainer compiled", BERT, "train, batch 32, the Trainer compiled", BEST, 1.5, None),
    ("fine-tune BERT-base, GPU, batch 256", BERT, "train, batch 256", TRAINER, 3.0, None),
    ("fine-tune BERT-base, GPU, batch 256", BERT, "train, batch 256", BEST, 1.5, None),
    ("fine-tune BERT-base, GPU, 512 tokens", BERT, "train, 512 tokens, batch 64", None, 0.5, None),
    ("same, no attention dropout", BERT, "train, 512 tokens, batch 64, no attention dropout", None, 0.5, None),
    ("features of BERT-base, GPU", BERT, "features, batch 32", ENCODE, 2.0, None),
)
RIVALS = {
    TRAINER: "`Trainer` as it comes",
    BEST: "`Trainer`, best settings",
    ENCODE: "`encode`",
    None: "matrix products, fastest library",
    MM: "matrix products, `torch.mm`",
}


def speed_rows(part: str) -> list[dict]:
    """Rows of one part from the files of all devices, the GPU day's among them."""
    names = [path.stem for kind in ("speed-*.json", "gpu-day-[234]-*.json") for path in sorted(RESULTS.glob(kind))]
    return [row for name in names for row in rows_of(name, part=part)]


def reached(part: str, work: str, rival: str | tuple[str, ...] | None, device: str = "") -> tuple[dict, dict] | None:
    """The ftlib method that does best: (median, min, max) and its row; among several rivals the fastest counts."""
    found = []
    for row in speed_rows(part):
        mine = row.get("method", "").startswith("ftlib") and "per_second" in row
        if mine and work in ("", row["work"]) and device in ("", row["device"]):
            if rival in (None, MM):
                name = "utilisation" if rival is None else "utilisation_mm"
                values = [row[name]] if row.get(name) else []
            else:
                values = [value for base, value in row["against"].items() if base.startswith(rival)]
            if values:
                found.append((min(values, key=lambda value: value["median"]), row))
    return max(found, key=lambda pair: pair[0]["median"], default=None)


def devices(part: str) -> list[str]:
    return list(dict.fromkeys(row["device"] for row in speed_rows(part)))


def goals() -> str:
    """A table of the CPUs and one of the GPUs, one column a device; what no device has is left out."""
    tables = []
    for parts in (("fine-tune", "features", "titles"), (BERT,)):
        names = list(dict.fromkeys(device for part in parts for device in devices(part)))
        lines = [goal_line(goal, names) for goal in GOALS if goal[1] in parts]
        if lines := [line for line in lines if any(line[name] for name in names)]:
            tables.append(results_table(lines)._repr_markdown_())
    return (
        "**Speed: the goals.** The same work side by side: same model, sentences and number of steps. A "
        "ratio is the median over rounds of the ratio within a round, with the smallest and largest, and carries over "
        "to other machines better than a rate does. `Trainer`'s best settings are searched on each device; of "
        "several ways to call `encode` the fastest counts. Matrix products: the work on real tokens alone against "
        "the rate at which this machine multiplies large matrices, taken in the same rounds, by the fastest library "
        "there is, oneDNN, and by `torch.mm` (in float32 on AMD's CPUs that is MKL, half as fast; in bf16 it is oneDNN "
        "too).\n\n" + "\n\n".join(tables)
    )


def ranged(value: dict, row: dict, shown: Callable[[float], str]) -> str:
    """A median over rounds with the smallest and largest; of one round there is nothing more to say."""
    if row.get("rounds") == 1:
        return f"{shown(value['median'])} (one round)"
    return f"{shown(value['median'])} ({shown(value['min'])} to {shown(value['max'])})"


def goal_line(goal: tuple, names: list[str]) -> dict[str, str]:
    """A goal and what each of these devices reached, by which of ftlib's methods."""
    words, part, work, rival, plain, with_amx = goal

    def shown(value: float, share: bool = rival in (None, MM)) -> str:
        return f"{100 * value:.0f} %" if share else f"{value:.2f} ×"

    other = with_amx and any("amx" in name for name in names)
    aim = f"≥ {shown(plain)}" + (f", with AMX ≥ {shown(with_amx)}" if other else "")
    line = {"work": words, "against": RIVALS.get(rival, rival), "goal": aim}
    for name in names:
        value, best = reached(part, work, rival, name) or (None, {})
        line[name] = f"{ranged(value, best, shown)}, {best['method']}" if value else ""
    return line


def measured(rows: list[dict]) -> str:
    """One comparison: a row a method, what was found by search, and where the numbers come from."""
    searched = [row for row in rows if "tried" in row]
    missing = [f"{row['method']}: {row['missing']}." for row in rows if "missing" in row]
    missing += [f"{setting(one['change'])}: {one['why']}." for row in searched for one in row.get("left_out", [])]
    rows = [row for row in rows if "per_second" in row]
    bases = list(dict.fromkeys(base for row in rows for base in row["against"]))
    table = []
    for row in rows:
        line = {"method": row["method"], "per second": row["per_second"]}
        line |= {f"× {base}": row["against"][base]["median"] for base in bases}
        if any("utilisation" in r for r in rows):
            line["of matrix products, %"] = 100 * row["utilisation"]["median"]
        if any("utilisation_mm" in r for r in rows):
            line["of torch.mm, %"] = 100 * row["utilisation_mm"]["median"]
        if any("cosine" in r for r in rows):
            line["smallest cosine"] = f"{row['cosine']:.4f}"
        if any("loss" in r for r in rows):
            line["mean loss"] = f"{row['loss']:.4f}"
        if any("peak_gpu_mb" in r or "peak_mb" in r for r in rows):
            line["peak MB"] = round(row["peak_gpu_mb" if row.get("peak_gpu_mb") else "peak_mb"])
        table.append(line)
    text = f"**{rows[0]['work']}**, {rows[0]['device']}\n\n{results_table(table, digits=2)._repr_markdown_()}\n\n"
    for row in (row for row in searched if row["tried"]):
        tried = "; ".join(
            f"{setting(step['change'])}: {step['faster']['median']:.2f} ×{'' if step['kept'] else ', dropped'}"
            for step in row["tried"]
        )
        once = all(step["faster"].get("min") == step["faster"].get("max") for step in row["tried"])
        how = ", compared once each" if once else ""
        text += f"*Settings of the `Trainer` tried, one on top of the other{how}: {tried}.*\n\n"
    text += "".join(f"*{line}*\n\n" for line in missing)
    return text + stamp(rows[0])


def setting(change: dict) -> str:
    return ", ".join(f"{name}={value}" for name, value in change.items())


def stamp(row: dict) -> str:
    versions = ", ".join(f"{package} {number}" for package, number in row["versions"].items())
    beside = f"; {row['remark']}" if "remark" in row else ""
    return f"*`{row['command']}`; {row['device']}, {row['threads']} threads; {versions}; {row['date']}{beside}.*"


def speed() -> str:
    searches = speed_rows("Trainer search") + speed_rows("Trainer search, titles")
    parts = []
    for part in ("fine-tune", "features", "titles", BERT):
        rows = speed_rows(part)
        for work, device in dict.fromkeys(sorted((row["work"], row["device"]) for row in rows)):
            same = [r for r in [*searches, *rows] if (r["device"], r["work"]) == (device, work)]
            if any("per_second" in row for row in same):
                parts.append(measured(same))
    return "\n\n".join([goals(), *parts])


def memory() -> str:
    """The measured remedies, a table a device."""
    rows = speed_rows("memory")
    parts = []
    for device, work in dict.fromkeys((row["device"], row["work"]) for row in rows):
        same = [row for row in rows if (row["device"], row["work"]) == (device, work)]
        missing = "".join(f"\n\n*{row['method']}: {row['missing']}.*" for row in same if "missing" in row)
        same = [row for row in same if "missing" not in row]
        if not same:
            continue
        peaks = [row.get("peak_gpu_mb") or row["peak_mb"] for row in same]
        table = [
            {
                "what": row["method"], "peak MB": round(peak), "of the first": peak / peaks[0],
                "seconds a step": row["seconds_a_step"],
            }
            for row, peak in zip(same, peaks, strict=True)
        ]  # fmt: skip
        parts.append(f"{work}:\n\n{results_table(table, digits=2)._repr_markdown_()}{missing}\n\n{stamp(same[0])}")
    return "\n\n".join(parts)


HEADS = ("all logits at once", "in chunks", "F.linear_cross_entropy")


def head_memory() -> str:
    """What head and loss of a language model hold, a line a vocabulary and precision; ratio: in chunks to at once."""
    rows, table = rows_of("head_memory"), []
    for words, precision, trains in dict.fromkeys((row["words"], row["precision"], row["trains"]) for row in rows):
        same = chosen(rows, words=words, precision=precision, trains=trains)
        found = {row["method"]: row["mb"] for row in same}
        line = {"vocabulary": f"{words:,}", "precision": precision, "the head": "trains" if trains else "is frozen"}
        line |= {f"{method}, MB": round(found[method]) if method in found else "" for method in HEADS}
        table.append(line | {"ratio": found["in chunks"] / found["all logits at once"]})
    what = f"Head and cross-entropy of {rows[0]['tokens']:,} tokens, 576 wide, forward and backward"
    shown = results_table(table, digits=2)._repr_markdown_()
    return f"{what}:\n\n{shown}\n\n*{source('head_memory')}*"


# ------------------------------------------------------------------------------------------------------ the GPU day

NO_GPU = "No GPU has been measured so far; `make gpu-day` does it, in nine minutes."


def gpu_day() -> str:
    """Parts 1, 3 and 6 of every GPU, whose speed and memory stand beside the CPUs'; or that there is none."""
    found = []
    kinds = {"1-tests": gpu_tests, "3-profile": gpu_profile, "6-decoders": gpu_decoders}
    for kind, table in kinds.items():
        for path in sorted(RESULTS.glob(f"gpu-day-{kind}-*.json")):
            rows = stored(path.stem)["rows"]
            found += [f"{text}\n\n{stamp(row)}" for text, row in table(rows)] if rows else []
    if [*RESULTS.glob("gpu-day-2-*.json")]:
        found.append(
            "Speed is among the results [above](#results), memory [below](#memory). Small batches are no work for such "
            "a GPU: it waits for the processor that starts its kernels, and so does every way to train, ours too."
        )
    return "\n\n".join(found or [NO_GPU])


def gpu_tests(rows: list[dict]) -> list[tuple[str, dict]]:
    counts = {word: sum(row["outcome"] == word for row in rows) for word in ("passed", "failed", "skipped")}
    text = f"**Tests that need CUDA**: {', '.join(f'{count} {word}' for word, count in counts.items())}."
    for row in rows:
        if row["outcome"] == "failed":
            last = (row["message"].strip().splitlines() or [""])[-1]
            text += f"\n- `{row['test']}`: `{last[:200]}`"
    return [(text, rows[0])]


def gpu_profile(rows: list[dict]) -> list[tuple[str, dict]]:
    """The ways side by side; then of the first one operators, kernels, and where in the source it waits."""
    rows = [row for row in rows if "missing" not in row]
    if not rows:
        return []
    table = [
        {
            "method": row["method"], "ms a step": 1000 * row["seconds_a_step"],
            "of them on the GPU": 1000 * row["gpu_seconds_a_step"] if "busy" in row else "",
            "busy, %": 100 * row["busy"] if "busy" in row else "",
            **{name: row["a_step"].get(name, "") for name in ("launches", "waits", "copies from the GPU")},
        }
        for row in rows
    ]  # fmt: skip
    text = f"**Where the time of a small step goes**: {rows[0]['work']}.\n\n"
    text += results_table(table, digits=2)._repr_markdown_()
    first = rows[0]
    operators = [
        {
            "operator": f"`{one['name']}`",
            "times a step": one["times"],
            "ms of the CPU's": 1000 * one["seconds"],
        }
        for one in first["operators"]
    ]
    text += f"\n\nThe operators of {first['method']}:\n\n{results_table(operators, digits=2)._repr_markdown_()}"
    if first["kernels"]:
        kernels = [{"kernel": f"`{name}`", "ms a step": 1000 * own} for name, own in first["kernels"].items()]
        text += f"\n\nIts kernels:\n\n{results_table(kernels, digits=3)._repr_markdown_()}"
    places = [f"`{place}` ({count:.1f})" for place, count in first["waiting"].items()]
    text += f"\n\nIt waits for the GPU at (times a step): {', '.join(places)}." if places else ""
    return [(text, first)]


def gpu_decoders(rows: list[dict]) -> list[tuple[str, dict]]:
    """A large decoder fine-tuned, LoRA and in full."""
    texts = []
    for work in dict.fromkeys(row["work"] for row in rows):
        own = [row for row in rows if row["work"] == work]
        measured = [row for row in own if "missing" not in row]
        bases = dict.fromkeys(base for row in measured for base in row["against"])
        table = [
            {"method": row["method"], "tokens a second": round(row["per_second"])}
            | {f"× {base}": f"{row['against'][base]:.2f}" for base in bases if base in row["against"]}
            | {"MFU, %": f"{100 * row['mfu']['median']:.0f}" if row["mfu"] else ""}
            | {"of products, %": f"{100 * row['utilisation']['median']:.0f}"}
            | {"peak GPU MB": round(row["peak_gpu_mb"]) if row["peak_gpu_mb"] else ""}
            | {"first loss": f"{row['losses'][0]:.4f}"}
            for row in measured
        ]
        missing = "".join(f"\n\n*{row['method']}: {row['missing']}.*" for row in own if "missing" in row)
        shown = f"{results_table(table)._repr_markdown_()}" if table else ""
        texts.append((f"**{own[0]['part']}**: {work}.\n\n{shown}{missing}".strip(), own[0]))
    return texts


def picture() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from ftlib.show import plots

    ax = None
    for part, strategy, label in (
        ("accuracy", "full", "fine-tune the whole encoder"),
        ("probe", "probe", "features and logistic regression"),
    ):
        runs = runs_of(rows_of("fine_tuning", part=part, strategy=strategy), "count", lambda row: row["test"])
        points = {count: mean_std(own) for count, own in sorted(runs.items())}
        ax = plots.points_with_errors(
            [*points],
            *zip(*points.values(), strict=True),
            label,
            ax,
            xlabel="labeled sentences (rotten-tomatoes)",
            ylabel="test accuracy",
        )
    ax.set_title("Fine-tune, or extract features? Mean ± std over 5 seeds")
    ax.figure.savefig(ROOT / "tests/benchmarks/results/learning_curve.png", dpi=110, bbox_inches="tight")


def strategies_picture() -> None:
    """How far every strategy is from full fine-tuning, with its interval, from few parameters to many, by size."""
    import matplotlib.pyplot as plt

    from ftlib.show import plots

    trainable = {row["strategy"]: row["trainable"] for row in rows_of("strategies-cost")}
    panels = [(corpus, *one) for corpus in CORPORA for one in accuracies(corpus).items()]
    figure, axes = plt.subplot_mosaic("AB;AC", figsize=(11, 6), dpi=110, layout="constrained")
    colors = {"tie": "0.45", "more": plots.PALETTE[0], "less": plots.PALETTE[1]}
    for ax, (corpus, count, runs) in zip(axes.values(), panels, strict=True):
        gaps = against({name: own for name, own in runs.items() if len(own) == len(runs["full"])}, "full")
        names = sorted(gaps, key=trainable.get)
        for place, name in enumerate(names):
            gap = gaps[name]
            ax.plot([gap.low, gap.high], [place, place], color=colors[gap.verdict], linewidth=2)
            ax.plot(gap.value, place, "o", color=colors[gap.verdict])
        ax.axvline(0, color="black", linewidth=0.8)
        ax.set_yticks(range(len(names)), [f"{name}  {trainable[name]:,}" for name in names], fontsize=9)
        ax.set_title(f"{CORPORA[corpus]}: {count:,} texts for training", fontsize=11)
        ax.set_xlabel("test accuracy minus that of full fine-tuning")
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / "strategies.png")


def half_precision() -> str:
    """Loss, accuracy and test loss of both precisions, and their paired differences with a 95 % interval (t)."""
    rows = rows_of("half_precision")
    seeds = sorted({row["seed"] for row in rows})
    by = {(row["seed"], row["precision"]): row | {"last": statistics.fmean(row["losses"][-20:])} for row in rows}
    steps = len(rows[0]["losses"])
    table = []
    for words, key in (
        (f"training loss, last 20 of {steps} steps", "last"), ("test loss", "test_loss"), ("test accuracy", "accuracy"),
    ):  # fmt: skip
        values = {name: [by[seed, name][key] for seed in seeds] for name in ("fp32", "bf16")}
        gap = paired(values["bf16"], values["fp32"])
        line = {name: f"{statistics.fmean(own):.4f} ± {statistics.stdev(own):.4f}" for name, own in values.items()}
        verdict = {"more": "higher", "less": "lower"}.get(gap.verdict, gap.verdict)
        table.append({"what": words, **line, "difference": f"{gap:.4f}", "bf16 is": verdict})
    return (
        f"**Half precision**: MiniLM trained on 1,280 film reviews in float32 and in bf16, {len(seeds)} seeds each: "
        "mean ± standard deviation over seeds, and the paired difference with its 95 % interval, a tie where "
        "it holds 0.\n\n"
        f"{results_table(table)._repr_markdown_()}\n\n![Loss of every step in both precisions]"
        f"(results/half_precision.png)\n\n*{source('half_precision')}*"
    )


def half_precision_picture() -> None:
    """The loss curves of all seeds, smoothed over 5 steps, one precision over the other, and their difference below."""
    import matplotlib.pyplot as plt
    import numpy as np

    rows = {name: rows_of("half_precision", precision=name) for name in ("fp32", "bf16")}
    losses = {name: np.array([row["losses"] for row in own]) for name, own in rows.items()}
    smooth = {k: np.apply_along_axis(np.convolve, 1, v, np.ones(5) / 5, "valid") for k, v in losses.items()}
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 5), dpi=110, layout="constrained", sharex=True)
    places = np.arange(5, losses["fp32"].shape[1] + 1)
    for seed, (full, half) in enumerate(zip(smooth["fp32"], smooth["bf16"], strict=True)):
        above.plot(places, full, color=f"C{seed}", linewidth=3, alpha=0.35, label="float32" if seed == 0 else None)
        above.plot(places, half, color=f"C{seed}", linewidth=1, linestyle="--", label="bf16" if seed == 0 else None)
    below.plot(np.arange(1, losses["fp32"].shape[1] + 1), (losses["bf16"] - losses["fp32"]).T, linewidth=1)
    above.set(ylabel="training loss, mean of 5 steps", title="MiniLM on film reviews, 5 seeds in both precisions")
    below.set(ylabel="bf16 − float32, each step", xlabel="step of 32 sentences")
    above.legend(frameon=False)
    for ax in (above, below):
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(ROOT / "tests/benchmarks/results/half_precision.png")
    plt.close(figure)


def profiles() -> str:
    """Milliseconds of a step by what it computes, a table a device and precision."""
    texts = []
    for work, device in dict.fromkeys((row["work"], row["device"]) for row in speed_rows("profile")):
        rows = [row for row in speed_rows("profile") if (row["work"], row["device"]) == (work, device)]
        table = [
            {"method": row["method"], "ms a step": 1000 * row["seconds_a_step"]}
            | {group: 1000 * seconds for group, seconds in row["groups"].items()}
            for row in rows
        ]
        shown = results_table(table, digits=0)._repr_markdown_()
        texts.append(f"**Where the time of a step goes**: {work}\n\n{shown}\n\n{stamp(rows[0])}")
    return "\n\n".join(texts)


def language_models() -> list[str]:
    """A decoder's fine-tuning, LoRA and in full, a table a device; and the settings of TRL's that were tried."""
    texts = []
    for path in sorted(RESULTS.glob("language_model-*.json")):
        for part in ("lora", "full"):
            rows = rows_of(path.stem, part=part)
            if rows:
                texts.append(language_model(rows, rows_of(path.stem, part=f"{part}, search")))
    return texts


TRL, TRL_BEST = "TRL, as it comes", "TRL, best settings found"
OURS, CHECKPOINTED = "ftlib.fit, unpad", "ftlib.fit, unpad, gradient_checkpointing"


def decoder_headlines() -> list[tuple[str, str, str]]:
    """Speed and memory beside TRL's SFTTrainer, on the first device that was measured."""
    path = next(iter(sorted(RESULTS.glob("language_model-*.json"))))
    held = {part: {row["method"]: row for row in rows_of(path.stem, part=part)} for part in ("lora", "full")}
    against = held["lora"][OURS]["against"]
    paired = [against[TRL], against[TRL_BEST]]
    speed = [f"{one['median']:.2f} × ({one['min']:.2f} to {one['max']:.2f})" for one in paired]
    memory = [f"{ways[CHECKPOINTED]['peak_mb'] / ways[TRL]['peak_mb']:.2f} ×" for ways in held.values()]
    return [
        ("LoRA on SmolLM2-135M, tokens a second, against TRL as it comes", speed[0], "language_model"),
        ("the same, against TRL with the best settings found", speed[1], "language_model"),
        ("peak memory of it, both with gradient checkpointing; and of full fine-tuning", " and ".join(memory),
         "language_model"),
    ]  # fmt: skip


def language_model(rows: list[dict], tried: list[dict]) -> str:
    missing = "".join(f"\n\n*{row['method']}: {row['missing']}.*" for row in [*tried, *rows] if "missing" in row)
    rows, tried = ([row for row in some if "missing" not in row] for some in (rows, tried))
    held = {row["method"]: row for row in rows}
    table = []
    for row in rows:
        off = row.get("off_plain", row.get("off_alone"))
        line = {"method": row["method"], "tokens a second": round(row["per_second"])}
        for base, short in ((TRL, "TRL"), (TRL_BEST, "TRL's best")):
            if base in held:
                ratio = row["against"].get(base)  # not all ways were measured beside the best settings
                line[f"× {short}"] = f"{ratio['median']:.2f}" if ratio else ""
        line |= {"peak MB": round(row["peak_mb"]), "above the model MB": round(row["above_mb"])}
        if TRL in held:
            line["of TRL's"] = f"{row['peak_mb'] / held[TRL]['peak_mb']:.2f}"
        table.append(line | {"loss off by": "" if off is None else f"{off:.0e}"})
    about = rows[0]["lengths"]
    settings = "; ".join(
        f"{row['method'].removeprefix('TRL, ')}: {row['per_second']:.0f}"
        + (f" (first loss off by {row['off_alone']:.0e})" if "off_alone" in row else "")
        for row in tried
    )
    best = held.get(TRL_BEST, {}).get("settings")
    return (
        f"**{rows[0]['work']}**, {rows[0]['device']}: questions of atis answered as JSON, rows of {about['min']} to "
        f"{about['max']} tokens (median {about['median']}), {100 * about['trained']:.0f} % of them trained, "
        f"{100 * about['padding']:.0f} % of the padded batches padding. × is the median over {rows[0]['rounds']} "
        "rounds of the ratio within a round; the loss is off from the plain loop's in float32 at the step where they "
        f"differ most.\n\n{results_table(table)._repr_markdown_()}{missing}\n\n"
        f"*TRL's settings tried, tokens a second: {settings}. Best: {setting(best) if best else 'none'}.*\n\n"
        f"{stamp(rows[0])}"
    )


FAULTS = (
    "SIGKILL at a random moment", "SIGKILL while a checkpoint is written", "SIGKILL before each line of the writing",
    "SIGKILL of one of two processes under torchrun", "Ctrl-C at a random moment", "a full disk",
    "the newest checkpoint damaged", "a loss or gradient that is NaN or infinite",
    "files, data and settings made to break it",
)  # fmt: skip
BESIDE = {
    "left a half-written checkpoint": "{} left a half-written checkpoint", "lines": "all {} lines",
    "returned a run with all its steps": "{} returned a run, the others came before the first step",
    "how": "on a small {}",
}  # fmt: skip


def two_hosts() -> str:
    """Faults of a network and of the hosts on it, and the losses where nothing happened."""
    rows = rows_of("two_hosts")
    table = []
    for row in (row for row in rows if "tried" in row):
        kernel = f", tcp_retries2 = {row['tcp_retries2']}" * (row["tcp_retries2"] != 8)
        times = f"{' and '.join(f'{one:.0f}' for one in row['seconds'])} s"
        beside = f"an error after {times}, then again" if row["started again"] else f"went on, done after {times}"
        line = {"two hosts": row["fault"] + kernel} | {key: row[key] for key in ("tried", "survived", "lost")}
        table.append(line | {"beside": beside})
    apart = [
        f"{row['largest difference']:.1e} ({row['distributed']}, {row['optimizer']})"
        for row in rows
        if "largest difference" in row
    ]
    return (
        f"Without a fault, {rows[0]['steps']} losses of {rows[0]['processes']} processes on two hosts differ from one "
        f"process's by at most {', '.join(apart)}.\n\n{results_table(table)._repr_markdown_()}\n\n"
        f"*{source('two_hosts')}*"
    )


def reliability() -> str:
    """What was tried on runs, what on versions, and a million rows; a dash where no row is stored."""
    found = {row["fault"]: row for row in rows_of("faults")}
    table = []
    for fault in FAULTS:
        row = found.get(fault, {})
        beside = "; ".join(words.format(row[key]) for key, words in BESIDE.items() if key in row)
        table.append({"fault": fault, **{key: row.get(key) for key in ("tried", "survived", "lost")}, "beside": beside})
    parts = [results_table(table)._repr_markdown_(), f"*{source('faults')}*", two_hosts()]
    table = []
    for part in ("tokenize", "extract_features"):
        rows = rows_of("long_features", part=part)
        row = max(rows, key=lambda row: row["rows"], default={})
        names = {
            "rows": "rows",
            "GB before": "before_gb",
            "GB after a tenth": "at_tenth_gb",
            "GB at the peak": "peak_gb",
        }
        table.append({"many short rows": f"`{part}`", **{name: row.get(key) for name, key in names.items()}})
    parts += [results_table(table, digits=2)._repr_markdown_(), f"*{source('long_features')}*"]
    table = [
        {
            "rows of `fit`": row["kind"], "rows": row["rows"],
            "own GB above the model": row["own_gb"] - row["own_model_gb"],
            "with pages of the file": row["peak_gb"] - row["model_gb"], "bytes a row": round(row["bytes_a_row"]),
            "seconds of the check": round(row["check_seconds"]),
        }
        for row in rows_of("million_rows")
    ]  # fmt: skip
    parts += [results_table(table, digits=2)._repr_markdown_(), f"*{source('million_rows')}*"]
    keys = ("pins", "what", "outcome", "tests", "skipped", "failed")
    table = [{key: row.get(key, "") for key in keys} for row in rows_of("pins")]
    parts.append(results_table(table)._repr_markdown_())
    said = [f"{row['pins']}: {row['why']}" for row in rows_of("pins", outcome="not installed")]
    days = sorted({f"{row['device']}, {row['date']}" for row in rows_of("pins")})
    parts.append(f"*`python tests/benchmarks/pins.py --notebooks -- PINS`; {'; '.join([*days, *said])}.*")
    keys = ("what", "outcome", "tests", "skipped", "failed")
    table = [{"instructions of": row["cpu"], **{key: row.get(key, "") for key in keys}} for row in rows_of("cpus")]
    parts += [results_table(table)._repr_markdown_(), f"*{source('cpus')}*"]
    return "\n\n".join(parts)


def headlines() -> str:
    """What a visitor wants to know first, each with the program that measured it."""

    def ratio(part: str, rival: str | tuple[str, ...], work: str = "") -> str:
        best = {device: reached(part, work, rival, device) for device in devices(part)}
        shown = {device: ranged(*pair, "{:.2f}".format).replace(" (", " × (") for device, pair in best.items() if pair}
        return "; ".join(shown.values() if len(shown) == 1 else (f"{text} on {name}" for name, text in shown.items()))

    costs = {row["strategy"]: row for row in rows_of("strategies-cost")}
    count, runs = max(accuracies("rotten-tomatoes").items())
    equal = ", a tie" if paired(runs["lora"], runs["full"]).verdict == "tie" else ""
    accuracy = " and ".join(format_cell(mean_std(runs[name])) for name in ("lora", "full"))
    saved = " and ".join(f"{costs[name]['bytes'] / 2**20:.1f}" for name in ("lora", "full"))
    cpu = next(device for device in devices("memory") if device.startswith("CPU"))
    kept = {row["method"]: row["peak_mb"] for row in speed_rows("memory") if row["device"] == cpu}
    first, less = kept["full fine-tuning, float32"], kept["unpad, micro-batches of 8"]
    runs = [row for row in rows_of("faults") if row["fault"] != FAULTS[-1]]
    tried, survived = (sum(row[key] for row in runs) for key in ("tried", "survived"))
    long = max(rows_of("long_features", part="extract_features"), key=lambda row: row["rows"])
    table = [
        ("fine-tuning MiniLM, against the `Trainer` as it comes", ratio("fine-tune", TRAINER), "speed"),
        ("the same, against the `Trainer` with the best settings found", ratio("fine-tune", BEST), "speed"),
        ("titles by a small T5, against the `Seq2SeqTrainer` as it comes", ratio("titles", TRAINER), "speed"),
        ("the same, against it with the best settings found", ratio("titles", BEST), "speed"),
        ("features of MiniLM, against sentence-transformers' `encode` in bf16", ratio("features", ENCODE), "speed"),
        ("features of MiniLM, against ONNX Runtime", ratio("features", "ONNX Runtime"), "speed"),
        (f"LoRA and full fine-tuning, {count:,} film reviews, test accuracy", f"{accuracy}{equal}", "strategies"),
        ("what the two save", f"{saved} MB", "strategies"),
        ("peak memory of a step with `unpad` and micro-batches of 8", f"{less / first:.2f} × of it without", "memory"),
        ("runs killed, stopped or damaged, that ended as if undisturbed", f"{survived:,} of {tried:,}", "faults"),
        (f"memory for the features of {long['rows']:,} short texts", f"{long['peak_gb']:.2f} GB", "long_features"),
    ]  # fmt: skip
    table[6:6] = decoder_headlines()
    for path in sorted(RESULTS.glob("gpu-day-6-*.json")):
        [lora] = [row for row in rows_of(path.stem, moves="lora", method="ftlib.fit, unpad")]
        gain = min(value for base, value in lora["against"].items() if base != "TRL, as it comes")
        table.append((f"LoRA on a Llama of 1.2 billion, {lora['device']}, against TRL with its best settings",
                      f"{gain:.2f} × (one run of 5 steps)", "gpu_day"))  # fmt: skip
    for words, part, work, rival, *_ in GOALS:
        several = part == BERT and any(row.get("rounds", 1) > 1 for row in speed_rows(BERT) if row["work"] == work)
        if several and rival in (TRAINER, ENCODE) and (value := ratio(part, rival, work)):
            table.append((f"{words}, against {RIVALS[rival]}", value, "gpu_day"))
    keys = ("what", "measured", "program")
    rows = [dict(zip(keys, (what, value, f"`{name}.py`"), strict=True)) for what, value, name in table]
    gpus = [name for name in devices(BERT) if not name.startswith("CPU")]
    said = f"{NO_GPU} [How]"
    if gpus:
        said = f"On an {' and an '.join(gpus)}, and what is *not* faster there: [the GPU day]"
    return f"{results_table(rows)._repr_markdown_()}\n\n{said}(#the-gpu-day)."


def section(name: str, text: str) -> str:
    """A text between the markers that say where it comes from."""
    return f"<!-- {name}: python tests/benchmarks/report.py -->\n\n{text}\n\n<!-- end of {name} -->"


def sections() -> dict[str, list[str]]:
    """{file: what stands between its markers}."""
    learned = [strategies(), multitask(), methods(), text_to_text()]
    learned += [table() for name, table in LATER.items() if (RESULTS / f"{name}.json").is_file()]
    results = "\n\n".join([*learned, speed(), profiles(), half_precision(), *language_models()])
    tables = [
        section("headlines", headlines()),
        section("results", results),
        section("gpu-day", gpu_day()),
        section("memory", f"{memory()}\n\n{head_memory()}"),
    ]
    tables.append(section("faults", reliability()))
    return {"tests/benchmarks/README.md": tables}


def main() -> None:
    for name, parts in sections().items():
        text = (ROOT / name).read_text(encoding="utf-8")
        for new in parts:
            first, *_, last = new.splitlines()
            text = re.sub(f"{re.escape(first)}.*{re.escape(last)}", lambda _, new=new: new, text, flags=re.DOTALL)
        (ROOT / name).write_text(text, encoding="utf-8")
    picture()
    strategies_picture()
    half_precision_picture()


if __name__ == "__main__":
    main()
