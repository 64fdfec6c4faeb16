"""The embedded default: a small generated world, its questions, and the small model that was pretrained on its text.

    from qatrun import demo

    demo.items("demo_facts")[0]          # {"query": ..., "choices": [4 texts], "answer": 0..3}
    next(demo.documents("finetune"))     # "... works as a baker. ..."
    demo.MODEL_DIR                       # a Hugging Face folder, made by scripts/pretrain_demo.py

Everything but the model comes out of code and the standard library, the same on every machine.
"""

from qatrun.demo.world import MODEL_DIR, TASKS, documents, items

# What a recipe writes as `path` to mean this model or this text.
BUILTIN = "builtin:demo"

__all__ = ["BUILTIN", "MODEL_DIR", "TASKS", "documents", "items"]
