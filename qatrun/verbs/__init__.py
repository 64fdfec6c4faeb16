"""The verbs of the command line, in rooms: parse, call, print. Nothing heavy is imported before one needs it."""
