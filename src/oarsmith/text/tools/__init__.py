"""How families of models write calls of functions in their answers; see `oarsmith.text.tool_parsing`."""
