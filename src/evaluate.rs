//! A student against the truth and against its teacher.
