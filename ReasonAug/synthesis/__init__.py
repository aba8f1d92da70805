"""Write training data with a language model: from concepts to training rows, resumable.

    concepts ─> definitions ─> problems ─> checked ─> solved ─> rewritten ─> clean ─> rows, card
       │            │             │           │          │          │          │
       └────────────┴──── calls: each asked once, its answer appended to the ledger

A stage reads the lines of the stage before it, makes calls, and writes one line per item that
entered it, in their order. It depends on nothing but these lines and the recorded answers, so
that the same ledger gives the same rows, byte for byte. Everything below `stages/` may be deleted
and is made again from the ledger without a call.

    file in output_dir       content
    config.yaml              the resolved config
    ledger/STAGE.jsonl       recorded calls of a stage (ledger.Record); append-only
    ledger/batches.jsonl     batches that were handed to a server's batch API
    stages/STAGE.jsonl       the items of a stage
    rows.jsonl               training rows in the format `reasonaug` (triplets.Row)
    summary.json             counts by stage and domain, calls, tokens, cost
    README.md                the card of the data
    quality/                 report on the data, with figures; also if a threshold refuses the rows
    sample.md                with --limit: a page to read before the money is spent
    finished.json            fingerprints of all inputs and outputs of a finished run

A record of the ledger: `key` (hash of model, prompt version, parameters and input), `item`
(id of the item that asked), `status` (ok, failed), `model`, `prompt` (NAME@VERSION), `parameters`,
`answer` (text, as the model wrote it), `reason` (of a failure, or that the answer is cut off),
`prompt_tokens`, `completion_tokens`, `attempts`, `seconds`, `origin` (live, batch, import).

A line of a stage, with the fields that are added from left to right:

    concepts      id, domain, kind (coding, numeric, text), concept, origin (file, built-in, model),
                  definition ("" if one must be written), dropped
    definitions   the same; definition is the whole document, with code in a coding domain
    problems      id (CONCEPT-ID/N), domain, kind, concept, n, options {context, difficulty, length,
                  persona}, problem, solution, answer (the final result; coding: the name of
                  the function), dropped
    checked       + on_topic (True, False, null without this check), rewritten (True, False)
    solved        + verification {method (executed, solved, judged, imported, none), accepted (True,
                  False, null if not verified), executed (True, False), tests, passed, agreed,
                  solutions, answers [..], reason}
    rewritten     + rewrites {forum, exam, long: text}, written_negative {concept, problem,
                  solution} or null
    clean         the same; decontaminated

`dropped` is null, or the reason why the item goes no further: unanswered (the call failed for
good), refused, cut_off (the answer ends at model.max_tokens), unreadable (even after a repair),
repeated (its text or name is there already), off_topic, wrong_solution, unverified, contaminated.
The next stage skips such an item.
"""
