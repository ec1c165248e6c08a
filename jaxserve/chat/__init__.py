"""Between messages and text: conversations become prompts, and what a model writes becomes messages.

`ChatFormat` is how one model does both; `AnswerParser` reads one answer while it comes.
"""
