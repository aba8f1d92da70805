"""Score exports on FollowIR, LongEmbed, BRIGHT and own tasks, in a loop or as a job array.

A text on its way from a task of mteb to a score, with four steps between mteb and torch:

       datasets            document_texts: title + text, query_texts: text + own instruction
          |
       mteb.evaluate
    1     |  scoring             ExactSearch.search: all queries, documents block by block
    2     |  models              TemplatedEmbedder.embed: puts the model's template around a text,
          |    or embed             or VectorStore.embed: looks up a stored vector
    3     |  model/load_export   LoadedExport.encode_texts: tokenises, cuts and packs
    4     |  model/encoder       Encoder.forward: one vector per text
       torch
          |
       scoring             dot products, best documents, score of each query
       results             result.json
       report              report.md and report.json, of all results

A large evaluation separates the two halves: `embedding_plan` lists every distinct text of all tasks
once, array elements `embed` them into a store, and scoring reads the store.

    tasks, datasets                 elements, instructions, own tasks; the tasks' data
    models                          exports, on this machine's devices
    distinct_texts, embedding_plan  every distinct text once, in blocks of equal cost
    embed                           vectors of blocks: written and looked up
    scoring, query_scores, run      one element, its scores of single queries, all elements
    results, tables, report         result.json; intervals, tables and plots; the report
    encode, encode_files            `diffembed encode`: a user's file to vectors
    probe                           `diffembed probe`: tags of words

A text of a plan is hashed when it is listed and again when it is looked up, in another job: data
that have changed in between must not get the vectors of the old ones.
"""
