// One level: everything that its unit compiles. Included inside the level's namespace, after its vector type.

// The guess of the next row's k-th largest magnitude, over this row's: a few candidates more than k, rarely fewer.
constexpr float kGuessMargin = 0.93f;

// Lines of a panel: wide enough to hide the work per term, narrow enough that the panel of a large source stays in L2.
constexpr int kPanelLines = 4;

#include "topk.inl"

#include "entries.inl"

#include "products.inl"

#include "maps.inl"

#include "lstm.inl"

#include "activation.inl"

#include "optimizer.inl"

template <class S, class T>
constexpr ProductKernels<S, T> kProducts = {kSourceLines<S, T> * Line<S>::kEntries,
                                            kGatherLines<S> * Line<S>::kEntries,
                                            pack<S>,
                                            pack_transposed<S>,
                                            gather_product<S, T>,
                                            dense_product<S, T>};

template <class T>
constexpr TypedKernels<T> kTyped = {kProducts<T, T>,
                                    topk_rows<T>,
                                    widen_range<T>,
                                    count_upper_halves<T>,
                                    keys_from<T>,
                                    count_keys<T>,
                                    largest_entries<T>,
                                    sum_row<T>,
                                    drawn_entries<T>,
                                    add_columns<T>,
                                    add_scaled_rows<T>,
                                    sum_squares<T>,
                                    add_scaled<T>,
                                    drop<T>,
                                    drop_gradient<T>};

constexpr MapKernels kMaps = {gather_patches, add_patches};

constexpr LstmKernels kLstm = {kBlock, spread_gates, step_cells, step_cells_gradient};

template <class W>
constexpr LstmProducts<W> kLstmProducts = {kProducts<W, float>, pack_block<W>, dot_block<W>};

template <class S>
constexpr OptimizerKernels<S> kOptimizer = {sgd_row<S>, adam_row<S>, adagrad_row<S>};
