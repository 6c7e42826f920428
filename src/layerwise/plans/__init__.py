"""Who learns when: plans as plain validated data, and the strategies that write them."""
