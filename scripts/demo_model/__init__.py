"""Everything that makes the demo model: text generator, tokenizer, network, training.

Read in this order: `grammar` (templates with choices), `lexicon` and `facts` (what the
text is about), `stories`, `questions`, `arithmetic`, `structured`, `chat` (documents),
`corpus` (documents to packed token rows), `tokenizer`, `network`, `training`, `probes`.
"""
