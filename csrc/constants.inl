// Constants of every level. Included inside a level's namespace.

// The one key of every NaN: infinity's bits, plus one.
constexpr uint32_t kNanKey = 0x7f800001u;

// The guess of the next row's k-th largest magnitude, over this row's: a few candidates more than k, rarely fewer.
constexpr float kGuessMargin = 0.9f;
