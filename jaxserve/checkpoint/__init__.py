import logging

# It warns at import that PyTorch is missing, which is as it should be here.
logging.getLogger("transformers").setLevel(logging.ERROR)
