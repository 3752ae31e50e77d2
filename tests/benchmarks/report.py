"""Write the tables and the picture of the README from the stored results.

python tests/benchmarks/report.py        # rewrites README.md between its markers, and learning_curve.png
"""

import json
import re
from pathlib import Path

from ftlib.environment import mean_std, results_table, stored_results

ROOT = Path(__file__).parents[2]
START, END = "<!-- results: python tests/benchmarks/report.py -->", "<!-- end of results -->"


def rows_of(name: str, **wanted) -> list[dict]:
    return [r for r in stored_results(name)["rows"] if all(r.get(k) == v for k, v in wanted.items())]


def spread(rows: list[dict], key: str) -> tuple[float, float]:
    return mean_std([row[key] for row in rows])


def source(name: str) -> str:
    """Command, device, versions and dates of a results file, as one sentence."""
    content = stored_results(name)
    rows = content["rows"]
    dates = sorted({row["date"] for row in rows})
    devices = sorted({row["device"] for row in rows})
    versions = sorted({json.dumps(row["versions"], sort_keys=True) for row in rows})
    names = " or ".join(", ".join(f"{k} {v}" for k, v in json.loads(text).items()) for text in versions)
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"`{content['command']}`; {'; '.join(devices)}; {names}; {when}."


def fine_tuning() -> str:
    table = []
    for strategy in ("head-only", "last-layers", "full"):
        rows = rows_of("fine_tuning", part="strategies", strategy=strategy)
        table.append(
            {
                "what moves": strategy,
                "trainable parameters": rows[0]["trainable"],
                "learning rate": f"{rows[0]['rate']:g}",
                "test accuracy": spread(rows, "accuracy"),
                "seeds": len(rows),
            }
        )
    rows = rows_of("fine_tuning", part="curve", strategy="probe", count=2000)
    table.insert(
        0,
        {
            "what moves": "nothing: logistic regression on features",
            "trainable parameters": 385,
            "learning rate": "none",
            "test accuracy": spread(rows, "accuracy"),
            "seeds": len(rows),
        },
    )
    return (
        "**Which parameters move** (notebook 03): MiniLM, 2,000 sentences of rotten-tomatoes, 2 epochs, mean "
        "± standard deviation over seeds. Each learning rate is the best of a few on 500 sentences, by validation "
        "accuracy. Head-only loses to the logistic regression because the stock head reads [CLS], which MiniLM was "
        "not trained to use; the features are means over all tokens.\n\n"
        f"{results_table(table)._repr_markdown_()}\n\n*{source('fine_tuning')}*"
    )


def multitask() -> str:
    table = []
    for tasks, label in (
        ("intent", "intent alone"),
        ("slots", "slots alone"),
        ("intent+slots", "both on one encoder"),
    ):
        rows = rows_of("multitask", part="atis", tasks=tasks)
        table.append(
            {
                "atis, 2,000 sentences": label,
                "intent accuracy": spread(rows, "intent/accuracy") if "intent" in tasks else "",
                "slot F1": spread(rows, "slots/f1") if "slots" in tasks else "",
                "sentences through the encoder": rows[0]["steps"] * 32,
                "seeds": len(rows),
            }
        )
    first = results_table(table)._repr_markdown_()
    names = ("sentiment", "pairs", "intents")
    table = [
        {
            "unlike tasks": "one model each",
            **{n: spread(rows_of("multitask", part="unlike", tasks=n), f"{n}/accuracy") for n in names},
        }
    ]
    for temperature in (1.0, 5.0):
        rows = rows_of("multitask", part="unlike", tasks="all", temperature=temperature)
        table.append(
            {
                "unlike tasks": f"one model, temperature {temperature:g}",
                **{n: spread(rows, f"{n}/accuracy") for n in names},
            }
        )
    second = results_table(table)._repr_markdown_()
    return (
        "**Several tasks on one encoder** (notebook 05). Intents and slots of the same sentences: the joint model does "
        "the work of one single model, so half of what the two cost; the intents tie, the slots lose some F1 at this "
        f"budget of 3 epochs.\n\n{first}\n\nThree unlike tasks, test accuracy, 3 seeds, 2 epochs: film sentiment "
        "(rotten-tomatoes, 600 sentences), paraphrases (mrpc, 300 pairs), bank intents (banking77, 1,200 questions). "
        "At this small budget sharing gains nothing measurable. The sampling temperature says how often small tasks "
        "are drawn: at 1 in proportion to their size, above it more evenly.\n\n"
        f"{second}\n\n*{source('multitask')}*"
    )


def speed() -> str:
    table = [
        {
            "work": row["work"],
            "method": row["method"],
            "per second": row["per_second"],
            "against the first": row["ratio"],
        }
        for row in rows_of("speed")
    ]
    return (
        "**Speed**, the same work side by side. The last column is the median over rounds of the ratio within a "
        "round, so it is not the quotient of the median rates; ratios carry over to other machines better than rates "
        f"do.\n\n{results_table(table, digits=2)._repr_markdown_()}\n\n*{source('speed')}*"
    )


def picture() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from ftlib import plots

    ax = None
    for strategy, label in (
        ("full", "fine-tune the whole encoder"),
        ("probe", "features and logistic regression"),
    ):
        rows = [r for r in rows_of("fine_tuning") if r["strategy"] == strategy and r["part"] in ("curve", "strategies")]
        sizes = sorted({row["count"] for row in rows})
        points = [spread([row for row in rows if row["count"] == size], "accuracy") for size in sizes]
        ax = plots.points_with_errors(
            sizes,
            *zip(*points, strict=True),
            label,
            ax,
            xlabel="labelled sentences (rotten-tomatoes)",
            ylabel="test accuracy",
        )
    ax.set_title("Fine-tune, or extract features? Mean ± std over 3 seeds")
    ax.figure.savefig(ROOT / "tests/benchmarks/results/learning_curve.png", dpi=110, bbox_inches="tight")


def section() -> str:
    return f"{START}\n\n{fine_tuning()}\n\n{multitask()}\n\n{speed()}\n\n{END}"


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    new = re.sub(f"{re.escape(START)}.*{re.escape(END)}", lambda _: section(), text, flags=re.DOTALL)
    readme.write_text(new, encoding="utf-8")
    picture()


if __name__ == "__main__":
    main()
