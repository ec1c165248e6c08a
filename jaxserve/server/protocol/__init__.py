"""What goes over the wire: the types of requests and responses, in OpenAI's shapes."""
