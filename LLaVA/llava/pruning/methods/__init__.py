"""One file a method; OTPrune alone lives in ``llava.model.llava_arch``."""
