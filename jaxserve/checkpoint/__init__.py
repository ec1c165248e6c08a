import logging

# It warns at import that PyTorch is missing, which is as it should be here.
logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())
