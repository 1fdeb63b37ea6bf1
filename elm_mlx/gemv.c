/* CBLAS as MLX calls it, by the OpenBLAS of scipy-openblas32, whose names carry a prefix.

   OpenBLAS packs the matrix even for a product with a single row, which then takes 2 to 5 times as long as
   reading the matrix once. Such a product is sgemv's: a row times op(B) is op(B)' times a column, and B is read
   as it lies. MLX always multiplies in row-major order. Compiled by blas.py. */

enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };
void scipy_cblas_sgemm(int, int, int, int, int, int, float, const float *, int, const float *, int, float, float *,
                       int);
void scipy_cblas_dgemm(int, int, int, int, int, int, double, const double *, int, const double *, int, double, double *, int);
void scipy_cblas_cgemm(int, int, int, int, int, int, const void *, const void *, int, const void *, int, const void *, void *, int);
void scipy_cblas_sgemv(int, int, int, int, float, const float *, int, const float *, int, float, float *, int);

void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda,
                 const float *b, int ldb, float beta, float *c, int ldc) {
  if (order == ROW_MAJOR && m == 1 && k > 0 && n > 0) {
    int step = ta == NO_TRANS ? 1 : lda;
    if (tb == NO_TRANS) scipy_cblas_sgemv(order, TRANS, k, n, alpha, b, ldb, a, step, beta, c, 1);
    else scipy_cblas_sgemv(order, NO_TRANS, n, k, alpha, b, ldb, a, step, beta, c, 1);
  } else if (order == ROW_MAJOR && n == 1 && k > 0 && m > 0) {
    int step = tb == NO_TRANS ? ldb : 1;
    if (ta == NO_TRANS) scipy_cblas_sgemv(order, NO_TRANS, m, k, alpha, a, lda, b, step, beta, c, ldc);
    else scipy_cblas_sgemv(order, TRANS, k, m, alpha, a, lda, b, step, beta, c, ldc);
  } else {
    scipy_cblas_sgemm(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
  }
}
void cblas_dgemm(int order, int ta, int tb, int m, int n, int k, double alpha, const double *a, int lda,
                 const double *b, int ldb, double beta, double *c, int ldc) {
  scipy_cblas_dgemm(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
void cblas_cgemm(int order, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int lda,
                 const void *b, int ldb, const void *beta, void *c, int ldc) {
  scipy_cblas_cgemm(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
